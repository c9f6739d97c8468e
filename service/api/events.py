"""Routes of what happens in a job: its events as pages or as a stream, and its log."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from typing import Annotated

from fastapi import APIRouter, Header, Query, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from fastapi.sse import EventSourceResponse, format_sse_event

from service.api.access import JobReader
from service.api.backend import Backend, BackendOfApp
from service.api.job_wire import EventOut, EventsOut
from service.records.job import Event
from service.timestamps import rfc3339

KEEP_ALIVE_SECONDS = 15
_STREAM = "text/event-stream"
_RECONNECT_MS = 2000
_POLL_SECONDS = 0.5
_BATCH = 500

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

    With `Accept: text/event-stream`, stream them until the job has ended. A client that reconnects
    sends the header `Last-Event-ID`, as browsers do, and gets the events after that one.
    """
    await run_in_threadpool(backend.jobs.get, job_id, caller.tenant)
    if _STREAM in accept:
        seen = max(after, int(last_event_id or 0))
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return EventSourceResponse(_stream(backend, job_id, seen), headers=headers)
    events = await run_in_threadpool(backend.jobs.events, job_id, after, limit + 1)
    data = [_event_out(event) for event in events[:limit]]
    return EventsOut(
        data=data, has_more=len(events) > limit, last_seq=data[-1].seq if data else after
    )


async def _stream(backend: Backend, job_id: str, seen: int) -> AsyncIterator[bytes]:
    """Yield events as they are recorded, until the job has ended and all were sent.

    The event `bye` asks the client to reconnect, as this process is about to stop.
    """
    sent = time.monotonic()
    yield format_sse_event(retry=_RECONNECT_MS)
    while not backend.is_stopping():
        events = await run_in_threadpool(backend.jobs.events, job_id, seen, _BATCH)
        for event in events:
            seen = event.seq
            sent = time.monotonic()
            yield _message(event)
        if events:
            continue
        if await run_in_threadpool(_is_over, backend, job_id, seen):
            return
        if time.monotonic() - sent > KEEP_ALIVE_SECONDS:
            sent = time.monotonic()
            yield format_sse_event(comment="keep-alive")
        await asyncio.sleep(_POLL_SECONDS)
    yield format_sse_event(event="bye", data_str="{}")


def _is_over(backend: Backend, job_id: str, seen: int) -> bool:
    """Return whether the job has ended and no event comes after the one that was seen."""
    job = backend.jobs.get(job_id)
    return job.status.ended and job.version <= seen


def _event_out(event: Event) -> EventOut:
    return EventOut(seq=event.seq, at=rfc3339(event.at), type=event.type, data=event.data)


def _message(event: Event) -> bytes:
    document = _event_out(event).model_dump(exclude={"object"})
    return format_sse_event(id=str(event.seq), event=event.type, data_str=json.dumps(document))


@router.get("/logs", operation_id="get_log", response_class=StreamingResponse)
def get_log(
    backend: BackendOfApp,
    caller: JobReader,
    job_id: str,
    after: Annotated[
        int, Query(ge=0, le=2**62, description="Number of the last line that was seen.")
    ] = 0,
) -> Response:
    """Return the log of a job so far, one message of a stage a line.

    The header `X-Last-Line` of the answer is the number of its last line.
    """
    backend.jobs.get(job_id, caller.tenant)
    last = backend.jobs.last_line(job_id)

    def lines() -> Iterator[str]:
        seen = after
        while batch := [row for row in backend.jobs.log(job_id, seen, _BATCH) if row[0] <= last]:
            seen = batch[-1][0]
            yield "".join(f"{rfc3339(at)} {stage}: {text}\n" for _, at, stage, text in batch)

    return StreamingResponse(
        lines(),
        media_type="text/plain; charset=utf-8",
        headers={"X-Last-Line": str(max(last, after))},
    )
