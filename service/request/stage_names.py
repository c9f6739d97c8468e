"""What the stages of a job are called, and where a job's files are kept."""

PIPELINE = ("profile", "plan", "quantize", "tune", "evaluate")
"""The stages of `service.pipeline`."""

DELIVER = "deliver"
"""Handing over what was made, after the pipeline."""

STAGES = (*PIPELINE, DELIVER)
"""The stages of a job, in order."""

ESTIMATE = "estimate"
"""A command beside the stages: what a job would take."""

REQUEST = "request.json"
"""The file of a job's options."""


def request_place(job_id: str) -> str:
    """Return where a job's options are in the artifact store."""
    return f"requests/{job_id}"


def result_place(job_id: str) -> str:
    """Return where a job's results are in the artifact store."""
    return f"jobs/{job_id}"
