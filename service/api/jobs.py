"""Routes of jobs: submit, list, describe, cancel, retry, fork, delete."""

import asyncio
import time
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from service.api.access import JobReader, JobWriter
from service.api.backend import Backend, BackendOfApp
from service.api.job_responses import entity_tag, headers_of, job_out, job_response, version_of
from service.api.job_wire import ForkIn, JobIn, JobOut, JobsOut
from service.api.problems import respond
from service.errors import JobActive, RequestError
from service.records.job import Job, Status
from service.records.removal import remove_job
from service.records.submission import Submission
from service.request.confine import confine_model, confine_text
from service.request.options import RunOptions
from service.request.stage_names import ESTIMATE, STAGES

MAX_WAIT_SECONDS = 60
ESTIMATE_SECONDS = 90.0
_POLL_SECONDS = 0.25
_NOT_MODIFIED = 304

_BUDGET_MEANING = {"budget_of", "whole_file"}
"""Options that say what a budget counts. A fork that gives one of them replaces both."""

IdempotencyKey = Annotated[
    str | None, Header(min_length=1, max_length=255, pattern=r"^[\x20-\x7e]+$")
]

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
    idempotency_key: IdempotencyKey = None,
    dry_run: Annotated[
        bool, Query(description="Return what the job would take, and submit nothing.")
    ] = False,
) -> JobOut | Response:
    """Submit a job.

    With the header `Idempotency-Key`, a request that is sent again returns the first one's job.
    With `dry_run`, a worker estimates sizes, memory and time from the model's shape alone.
    """
    options = body.options()
    _check(backend, options)
    if body.profile is not None:
        backend.profile_owners.check(caller.tenant, body.profile)
    if dry_run:
        return _estimate(backend, options, body.profile)
    submission = Submission(
        tenant=caller.tenant,
        request=options.model_dump(mode="json"),
        name=body.name,
        labels=body.labels,
        priority=body.priority,
        key=idempotency_key,
        profile=body.profile,
    )
    job, _ = backend.job_service.submit(submission)
    return job_response(backend, job, response)


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
    """List jobs in pages, the newest first."""
    name, _, value = (label or "").partition(":")
    wanted = (name, value) if label is not None else None
    page = backend.job_service.page(
        caller.tenant, status=status, label=wanted, after=after, limit=limit
    )
    labels = backend.job_service.labels([job.id for job in page.rows])
    data = [job_out(job, labels[job.id]) for job in page.rows]
    return JobsOut(
        data=data,
        has_more=page.has_more,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
    )


@router.get("/{job_id}", operation_id="get_job", response_model=JobOut)
async def get_job(
    backend: BackendOfApp,
    caller: JobReader,
    job_id: str,
    response: Response,
    if_none_match: Annotated[str | None, Header(max_length=200)] = None,
    wait: Annotated[
        float, Query(ge=0, le=MAX_WAIT_SECONDS, description="Seconds to wait for a change.")
    ] = 0,
) -> JobOut | Response:
    """Describe a job. Its entity tag names its version.

    With `If-None-Match`, status 304 says that nothing has changed. With `wait`, the answer comes as
    soon as the job changes or ends, or after that many seconds.
    """
    end = time.monotonic() + wait
    job = await run_in_threadpool(backend.jobs.get, job_id, caller.tenant)
    seen = job.version if if_none_match is None else version_of(if_none_match, job)
    while (
        job.version == seen
        and not job.status.ended
        and time.monotonic() < end
        and not backend.is_stopping()
    ):
        await asyncio.sleep(_POLL_SECONDS)
        job = await run_in_threadpool(backend.jobs.get, job_id, caller.tenant)
    if if_none_match is not None and entity_tag(job) in if_none_match:
        return Response(status_code=_NOT_MODIFIED, headers=headers_of(job))
    return await run_in_threadpool(job_response, backend, job, response)


@router.post("/{job_id}/cancel", status_code=202, operation_id="cancel_job")
def cancel(backend: BackendOfApp, caller: JobWriter, job_id: str, response: Response) -> JobOut:
    """Cancel a job: at once if it is queued.

    If it runs, its stage is stopped within seconds, which frees the device.
    """
    return job_response(backend, backend.job_service.cancel(caller.tenant, job_id), response)


@router.post("/{job_id}/retry", status_code=202, operation_id="retry_job")
def retry(backend: BackendOfApp, caller: JobWriter, job_id: str, response: Response) -> JobOut:
    """Queue a job that failed or was cancelled again, from the stage that did not finish."""
    return job_response(backend, backend.job_service.retry(caller.tenant, job_id), response)


@router.post("/{job_id}/fork", status_code=202, operation_id="fork_job")
def fork(
    backend: BackendOfApp,
    caller: JobWriter,
    job_id: str,
    body: ForkIn,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> JobOut:
    """Start a new job from the plan stage of an old one.

    It has the same model and profile, and another budget or other constraints.
    """
    parent = backend.jobs.get(job_id, caller.tenant)
    if parent.profile is None:
        raise JobActive(f"job {job_id} has no profile yet; fork it once its profile is measured")
    options = _fork_options(parent, body)
    _check(backend, options)
    labels = body.labels
    if labels is None:
        labels = backend.job_service.labels([parent.id])[parent.id]
    submission = Submission(
        tenant=caller.tenant,
        request=options.model_dump(mode="json"),
        name=body.name or parent.name,
        labels=labels,
        priority=body.priority,
        key=idempotency_key,
        profile=parent.profile,
        parent=parent.id,
        first_stage=STAGES[1],
    )
    job, _ = backend.job_service.submit(submission)
    return job_response(backend, job, response)


@router.delete("/{job_id}", status_code=204, operation_id="delete_job")
def delete(backend: BackendOfApp, caller: JobWriter, job_id: str) -> None:
    """Delete a job that has ended, with its events, log and artifacts. Its profile stays."""
    job = backend.jobs.get(job_id, caller.tenant)
    if not remove_job(backend.database, backend.engine, backend.artifacts, job):
        raise JobActive(f"job {job_id} is {job.status}; cancel it first")


def _fork_options(parent: Job, body: ForkIn) -> RunOptions:
    """Return the options of a fork: its parent's, with what the body replaces."""
    changes = {
        name: getattr(body, name)
        for name in ("budget", "budget_of", "whole_file", "constraints")
        if getattr(body, name) is not None
    }
    kept = parent.request
    if _BUDGET_MEANING & changes.keys():
        kept = {name: value for name, value in kept.items() if name not in _BUDGET_MEANING}
    return RunOptions.model_validate(kept | changes | {"check_plans": 0})


def _check(backend: Backend, options: RunOptions) -> None:
    """Refuse a job that is known to fail, before it is queued.

    Raises:
        ServiceError, AllocatorError, QuantizerError: an option is out of range, or a model or text
            lies outside the folders that jobs may use.
    """
    settings = backend.settings
    visible = [root for root in settings.models if root.is_dir()]
    if settings.models and not visible:
        options.to_request()  # only workers see the folders, so they check the names
        return
    options.to_request(
        lambda name: confine_model(name, visible, hub=settings.hub),
        lambda name: confine_text(name, visible, hub=settings.hub),
    )


def _estimate(backend: Backend, options: RunOptions, profile: str | None) -> Response:
    """Return what a job would take, as a worker estimates it."""
    document = {"request": options.model_dump(mode="json"), "profile": profile}
    answer = backend.engine.call(ESTIMATE, document, ESTIMATE_SECONDS)
    if "problem" in answer:
        return respond(answer["problem"])
    if "outcome" not in answer:
        raise RequestError("the worker gave no estimate; see its log")
    return JSONResponse(answer["outcome"])
