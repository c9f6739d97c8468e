"""A job as the API answers with it, and the headers that go with it."""

import re
from typing import Any

from fastapi import Response

from service.api.backend import Backend
from service.api.job_wire import JobOut, StageOut
from service.records.job import Job
from service.records.submission import PRIORITIES
from service.timestamps import rfc3339, rfc3339_or_none

RETRY_AFTER_SECONDS = 2
"""How long a client should wait before it asks again for a job that has not ended."""

_PRIORITY_NAMES: dict[int, Any] = {number: name for name, number in PRIORITIES.items()}


def job_out(job: Job, labels: dict[str, str], stages: list[StageOut] | None = None) -> JobOut:
    """Return a job as it goes over the wire."""
    return JobOut(
        id=job.id,
        name=job.name,
        status=job.status.value,
        stage=job.stage,
        progress=job.progress,
        labels=labels,
        priority=_PRIORITY_NAMES[job.priority],
        attempt=job.attempt,
        version=job.version,
        parent=job.parent,
        profile=job.profile,
        created_at=rfc3339(job.created_at),
        started_at=rfc3339_or_none(job.started_at),
        finished_at=rfc3339_or_none(job.finished_at),
        stages=stages,
        request=job.request,
        result=job.result,
        error=job.error,
    )


def job_response(backend: Backend, job: Job, response: Response) -> JobOut:
    """Return a job with its labels and stages, and set the headers of the response."""
    response.headers.update(headers_of(job))
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    labels = backend.job_service.labels([job.id])[job.id]
    return job_out(job, labels, [_stage_out(row) for row in backend.jobs.stages(job.id)])


def headers_of(job: Job) -> dict[str, str]:
    """Return the headers that say which version of a job this is, and when to ask again."""
    headers = {"ETag": entity_tag(job), "Cache-Control": "no-cache"}
    return headers if job.status.ended else headers | {"Retry-After": str(RETRY_AFTER_SECONDS)}


def entity_tag(job: Job) -> str:
    """Return the entity tag of a job, which names its version."""
    return f'"{job.id}-{job.version}"'


def version_of(entity_tags: str, job: Job) -> int:
    """Return the version of a job that `If-None-Match` names; -1 if it names none."""
    seen = re.search(rf'"{job.id}-(\d{{1,9}})"', entity_tags)
    return int(seen[1]) if seen else -1


def _stage_out(row: dict[str, Any]) -> StageOut:
    times = {
        "started_at": rfc3339(row["started_at"]),
        "finished_at": rfc3339_or_none(row["finished_at"]),
    }
    return StageOut(**row | times)
