"""What happens in a job: events as pages or as a stream, the log, and the files it made."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

from service.api.access import JobReader
from service.api.backend import Backend, BackendOfApp
from service.api.downloads import archive, download
from service.api.job_wire import ArtifactOut, ArtifactsOut, EventOut, EventsOut
from service.api.wire import moment
from service.errors import ArtifactUnknown
from service.records.job import Event, Job, Status
from service.request.stage_names import result_place

KEEP_ALIVE_SECONDS = 15
_POLL_SECONDS = 0.5
_BATCH = 500
_STREAM = "text/event-stream"

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["jobs"])


@router.get(
    "/events",
    operation_id="list_events",
    response_model=EventsOut,
    responses={200: {"content": {_STREAM: {"schema": {"type": "string"}}}}},
)
async def get_events(
    backend: BackendOfApp,
    caller: JobReader,
    job_id: str,
    accept: Annotated[str, Header()] = "application/json",
    last_event_id: Annotated[str | None, Header(pattern=r"^\d{1,9}$")] = None,
    after: Annotated[
        int, Query(ge=0, le=2**31 - 1, description="Number of the last event that was seen.")
    ] = 0,
    limit: Annotated[int, Query(ge=1, le=_BATCH)] = 100,
) -> EventsOut | Response:
    """List a job's events, the oldest first.

    With `Accept: text/event-stream`, stream them until the job has ended.

    A stream that broke goes on with the header `Last-Event-ID`, as browsers send it.
    """
    await run_in_threadpool(backend.jobs.get, job_id, caller.tenant)
    if _STREAM in accept:
        seen = max(after, int(last_event_id or 0))
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(
            _stream(backend, job_id, seen), media_type=_STREAM, headers=headers
        )
    events = await run_in_threadpool(backend.jobs.events, job_id, after, limit + 1)
    data = [
        EventOut(seq=event.seq, at=moment(event.at), type=event.type, data=event.data)
        for event in events[:limit]
    ]
    return EventsOut(
        data=data, has_more=len(events) > limit, last_seq=data[-1].seq if data else after
    )


async def _stream(backend: Backend, job_id: str, seen: int) -> AsyncIterator[str]:
    """Yield events as they come, until the job has ended and all were sent.

    `bye` asks the client to come again.
    """
    heard = time.monotonic()
    yield "retry: 2000\n\n"
    while not backend.is_stopping():
        events = await run_in_threadpool(backend.jobs.events, job_id, seen, _BATCH)
        for event in events:
            seen, heard = event.seq, time.monotonic()
            yield _message(event)
        if not events:
            if (await run_in_threadpool(_ended, backend, job_id, seen)) is not None:
                return
            if time.monotonic() - heard > KEEP_ALIVE_SECONDS:
                heard = time.monotonic()
                yield ": still here\n\n"
            await asyncio.sleep(_POLL_SECONDS)
    yield "event: bye\ndata: {}\n\n"


def _ended(backend: Backend, job_id: str, seen: int) -> Job | None:
    """Return the job if nothing more can come."""
    job = backend.jobs.get(job_id)
    return job if job.status.ended and job.version <= seen else None


def _message(event: Event) -> str:
    data = {"seq": event.seq, "at": moment(event.at), "type": event.type, "data": event.data}
    return f"id: {event.seq}\nevent: {event.type}\ndata: {json.dumps(data)}\n\n"


@router.get("/logs", operation_id="get_log", response_class=StreamingResponse)
def get_log(
    backend: BackendOfApp,
    caller: JobReader,
    job_id: str,
    after: Annotated[
        int, Query(ge=0, le=2**62, description="Number of the last line that was seen.")
    ] = 0,
) -> Response:
    """Return the messages of a job's stages so far, a line each.

    The header `X-Last-Line` of the answer numbers the last.
    """
    backend.jobs.get(job_id, caller.tenant)
    last = backend.jobs.last_line(job_id)

    def lines() -> Iterator[str]:
        seen = after
        while batch := [row for row in backend.jobs.log(job_id, seen, _BATCH) if row[0] <= last]:
            seen = batch[-1][0]
            yield "".join(f"{moment(at)} {stage}: {text}\n" for _, at, stage, text in batch)

    return StreamingResponse(
        lines(),
        media_type="text/plain; charset=utf-8",
        headers={"X-Last-Line": str(max(last, after))},
    )


@router.get("/artifacts", operation_id="list_artifacts")
def list_artifacts(backend: BackendOfApp, caller: JobReader, job_id: str) -> ArtifactsOut:
    """List the files that a job made, with checksums; there are none before it has succeeded."""
    job = backend.jobs.get(job_id, caller.tenant)
    found = backend.artifacts.list(result_place(job.id)) if job.status is Status.SUCCEEDED else ()
    base = f"/v1/jobs/{job.id}/artifacts"
    rows = [
        ArtifactOut(
            name=row.name, size_bytes=row.size_bytes, sha256=row.sha256, url=f"{base}/{row.name}"
        )
        for row in found
    ]
    return ArtifactsOut(data=rows)


@router.get("/archive", operation_id="get_archive", response_class=StreamingResponse)
def get_archive(backend: BackendOfApp, caller: JobReader, job_id: str) -> Response:
    """Return all files that a job made as one tar archive, in a folder named by the job."""
    place = _place(backend, caller.tenant, job_id)
    return archive(backend.artifacts, place, backend.artifacts.list(place), job_id)


@router.get("/artifacts/{name:path}", operation_id="get_artifact", response_class=StreamingResponse)
def get_artifact(
    backend: BackendOfApp,
    caller: JobReader,
    job_id: str,
    name: str,
    request: Request,
) -> Response:
    """Return one file that a job made. Ranges are served, so a download that broke can go on."""
    place = _place(backend, caller.tenant, job_id)
    return download(backend.artifacts, place, backend.artifacts.find(place, name), request)


def _place(backend: Backend, tenant: str, job_id: str) -> str:
    job = backend.jobs.get(job_id, tenant)
    if job.status is not Status.SUCCEEDED:
        raise ArtifactUnknown(
            f"job {job_id} is {job.status}; its files are there once it has succeeded"
        )
    return result_place(job.id)
