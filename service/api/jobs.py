"""Jobs: submit, watch, cancel, retry, fork, delete."""

import asyncio
import re
import time
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from service.api.access import JobReader, JobWriter
from service.api.backend import Backend, BackendOfApp
from service.api.job_wire import ForkIn, JobIn, JobOut, JobsOut, StageOut
from service.api.problems import respond
from service.api.wire import moment
from service.errors import JobActive, RequestError
from service.records.job import Job, Status
from service.records.removal import remove_job
from service.records.submission import PRIORITIES, Submission
from service.request.confine import confine_model, confine_text
from service.request.options import RunOptions
from service.request.stage_names import ESTIMATE, STAGES

LONGEST_WAIT_SECONDS = 60
RETRY_AFTER_SECONDS = 2
ESTIMATE_SECONDS = 90.0
_POLL_SECONDS = 0.25
_NOT_MODIFIED = 304

_NAMES: dict[int, Any] = {number: name for name, number in PRIORITIES.items()}

_COUNTED = {"budget_of", "whole_file"}
"""The options that say what a budget counts; a fork that gives one of them replaces both."""

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


@router.post(
    "",
    status_code=202,
    operation_id="submit_job",
    response_model=JobOut,
    responses={
        200: {
            "description": "What the job would take; it was not submitted.",
            "model": dict[str, Any],
        }
    },
)
def submit(
    backend: BackendOfApp,
    caller: JobWriter,
    body: JobIn,
    response: Response,
    idempotency_key: Annotated[
        str | None, Header(min_length=1, max_length=255, pattern=r"^[\x20-\x7e]+$")
    ] = None,
    dry_run: Annotated[
        bool, Query(description="Say what the job would take, and submit nothing.")
    ] = False,
) -> JobOut | Response:
    """Submit a job.

    With the header `Idempotency-Key`, sending the same again gives the same job, not another.

    With `dry_run`, a worker says sizes, memory and time, from the model's shape alone.
    """
    options = body.options()
    _check(backend, options)
    if body.profile is not None:
        backend.profile_owners.check(caller.tenant, body.profile)
    if dry_run:
        return _estimate(backend, options, body.profile)
    asked = Submission(
        caller.tenant,
        options.model_dump(mode="json"),
        body.name,
        body.labels,
        body.priority,
        idempotency_key,
        body.profile,
    )
    job, _ = backend.job_service.submit(asked)
    return _told(backend, job, response)


@router.get("", operation_id="list_jobs")
def list_jobs(
    backend: BackendOfApp,
    caller: JobReader,
    status: Status | None = None,
    label: Annotated[
        str | None,
        Query(pattern=r"^[A-Za-z0-9_.-]{1,63}:[^\x00]{0,200}$", description="name:value"),
    ] = None,
    after: Annotated[
        str | None,
        Query(max_length=40, pattern=r"^[a-z0-9_]+$", description="last_id of the page before"),
    ] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> JobsOut:
    """List jobs, the newest first, in pages."""
    name, _, value = (label or "").partition(":")
    wanted = (name, value) if label is not None else None
    page = backend.job_service.page(
        caller.tenant, status=status, label=wanted, after=after, limit=limit
    )
    labels = backend.job_service.labels([job.id for job in page.rows])
    data = [job_out(job, labels[job.id]) for job in page.rows]
    ends = (data[0].id, data[-1].id) if data else (None, None)
    return JobsOut(data=data, has_more=page.has_more, first_id=ends[0], last_id=ends[1])


@router.get("/{job_id}", operation_id="get_job", response_model=JobOut)
async def get_job(
    backend: BackendOfApp,
    caller: JobReader,
    job_id: str,
    response: Response,
    if_none_match: Annotated[str | None, Header(max_length=200)] = None,
    wait: Annotated[
        float, Query(ge=0, le=LONGEST_WAIT_SECONDS, description="Seconds to wait for a change.")
    ] = 0,
) -> JobOut | Response:
    """Describe a job. Its entity tag is its version.

    With `If-None-Match`, 304 says that nothing has changed.

    With `wait`, the answer comes as soon as the job changes or has ended, or after that many
    seconds.
    """
    end = time.monotonic() + wait
    job = await run_in_threadpool(backend.jobs.get, job_id, caller.tenant)
    seen = _version_of(if_none_match, job)
    while (
        job.version == seen
        and not job.status.ended
        and time.monotonic() < end
        and not backend.is_stopping()
    ):
        await asyncio.sleep(_POLL_SECONDS)
        job = await run_in_threadpool(backend.jobs.get, job_id, caller.tenant)
    if if_none_match is not None and _tag(job) in if_none_match:
        return Response(status_code=_NOT_MODIFIED, headers=_headers(job))
    return await run_in_threadpool(_told, backend, job, response)


@router.post("/{job_id}/cancel", status_code=202, operation_id="cancel_job")
def cancel(backend: BackendOfApp, caller: JobWriter, job_id: str, response: Response) -> JobOut:
    """Cancel a job: at once if it is queued.

    If it runs, within seconds, and the device is free then.
    """
    return _told(backend, backend.job_service.cancel(caller.tenant, job_id), response)


@router.post("/{job_id}/retry", status_code=202, operation_id="retry_job")
def retry(backend: BackendOfApp, caller: JobWriter, job_id: str, response: Response) -> JobOut:
    """Try a job again that failed or was cancelled, from the stage that did not end."""
    return _told(backend, backend.job_service.retry(caller.tenant, job_id), response)


@router.post("/{job_id}/fork", status_code=202, operation_id="fork_job")
def fork(
    backend: BackendOfApp,
    caller: JobWriter,
    job_id: str,
    body: ForkIn,
    response: Response,
    idempotency_key: Annotated[
        str | None, Header(min_length=1, max_length=255, pattern=r"^[\x20-\x7e]+$")
    ] = None,
) -> JobOut:
    """Start a new job from the plan stage of an old one.

    Same model and profile, another budget or other constraints.
    """
    before = backend.jobs.get(job_id, caller.tenant)
    if before.profile is None:
        raise JobActive(f"job {job_id} has no profile yet; fork it once its profile is measured")
    changes = {
        name: getattr(body, name)
        for name in ("budget", "budget_of", "whole_file", "constraints")
        if getattr(body, name) is not None
    }
    kept = {name: value for name, value in before.request.items() if name not in _COUNTED}
    if not _COUNTED & changes.keys():
        kept = before.request
    options = RunOptions.model_validate(kept | changes | {"check_plans": 0})
    _check(backend, options)
    labels = (
        backend.job_service.labels([before.id])[before.id] if body.labels is None else body.labels
    )
    asked = Submission(
        caller.tenant,
        options.model_dump(mode="json"),
        body.name or before.name,
        labels,
        body.priority,
        idempotency_key,
        before.profile,
        before.id,
        STAGES[1],
    )
    job, _ = backend.job_service.submit(asked)
    return _told(backend, job, response)


@router.delete("/{job_id}", status_code=204, operation_id="delete_job")
def delete(backend: BackendOfApp, caller: JobWriter, job_id: str) -> None:
    """Delete a job that has ended, with its events, log and artifacts. Its profile stays."""
    job = backend.jobs.get(job_id, caller.tenant)
    if not remove_job(backend.database, backend.engine, backend.artifacts, job):
        raise JobActive(f"job {job_id} is {job.status}; cancel it first")


def job_out(job: Job, labels: dict[str, str], stages: list[StageOut] | None = None) -> JobOut:
    """Return a job as it goes over the wire."""
    return JobOut(
        id=job.id,
        name=job.name,
        status=job.status.value,
        stage=job.stage,
        progress=job.progress,
        labels=labels,
        priority=_NAMES[job.priority],
        attempt=job.attempt,
        version=job.version,
        parent=job.parent,
        profile=job.profile,
        created_at=moment(job.created_at),
        started_at=moment(job.started_at),
        finished_at=moment(job.finished_at),
        stages=stages,
        request=job.request,
        result=job.result,
        error=job.error,
    )


def _check(backend: Backend, options: RunOptions) -> None:
    """Refuse what could be known to fail, before it is queued.

    Raises:
        ServiceError, AllocatorError, QuantizerError: an option is out of range, or a name lies
            elsewhere.
    """
    settings = backend.settings
    here = [root for root in settings.models if root.is_dir()]
    if not here and settings.models:
        options.to_request()  # only workers see the folders, so they check the names
        return
    options.to_request(
        lambda name: confine_model(name, here, hub=settings.hub),
        lambda name: confine_text(name, here, hub=settings.hub),
    )


def _estimate(backend: Backend, options: RunOptions, profile: str | None) -> Response:
    answer = backend.engine.call(
        ESTIMATE, {"request": options.model_dump(mode="json"), "profile": profile}, ESTIMATE_SECONDS
    )
    if "problem" in answer:
        return respond(answer["problem"])
    if "outcome" not in answer:
        raise RequestError("the worker gave no estimate")
    return JSONResponse(answer["outcome"])


def _told(backend: Backend, job: Job, response: Response) -> JobOut:
    """Return a job with the headers that go with it."""
    response.headers.update(_headers(job))
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    stages = [
        StageOut(
            **row
            | {"started_at": moment(row["started_at"]), "finished_at": moment(row["finished_at"])}
        )
        for row in backend.jobs.stages(job.id)
    ]
    return job_out(job, backend.job_service.labels([job.id])[job.id], stages)


def _headers(job: Job) -> dict[str, str]:
    headers = {"ETag": _tag(job), "Cache-Control": "no-cache"}
    return headers if job.status.ended else headers | {"Retry-After": str(RETRY_AFTER_SECONDS)}


def _tag(job: Job) -> str:
    return f'"{job.id}-{job.version}"'


def _version_of(if_none_match: str | None, job: Job) -> int:
    """Return the version that a client has seen; without one, the version now."""
    if if_none_match is None:
        return job.version
    seen = re.search(rf'"{job.id}-(\d{{1,9}})"', if_none_match)
    return int(seen[1]) if seen else -1
