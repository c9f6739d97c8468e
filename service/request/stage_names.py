"""Names of the stages of a job, and places of its files in the artifact store."""

PIPELINE = ("profile", "plan", "quantize", "tune", "evaluate")
"""The stages of `service.pipeline`."""

DELIVER = "deliver"
"""Storing the results, after the pipeline."""

STAGES = (*PIPELINE, DELIVER)
"""The stages of a job, in order."""

ESTIMATE = "estimate"
"""A command beside the stages: an estimate of what a job would take."""

REQUEST = "request.json"
"""The file of a job's options."""


def request_place(job_id: str) -> str:
    """Return the place of a job's options."""
    return f"requests/{job_id}"


def result_place(job_id: str) -> str:
    """Return the place of a job's results."""
    return f"jobs/{job_id}"
