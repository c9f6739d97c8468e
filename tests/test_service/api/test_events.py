"""Promises of service.api.events: streams send keep-alives, resume, and end with their job."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from service.api import events
from service.api.backend import Backend
from service.records.job import Status
from service.records.submission import Submission
from tests.support.served import backend_in


@pytest.fixture
def backend(tmp_path: Path) -> Backend:
    return backend_in(tmp_path)


@pytest.fixture
def job_id(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> str:
    """A job that runs; its streams are fast."""
    monkeypatch.setattr(events, "_POLL_SECONDS", 0.01)
    job, _ = backend.job_service.submit(Submission("local", {"model": "m", "budget": "3bpw"}))
    backend.jobs.start_stage(job.id, 1, "profile", "w")
    return job.id


async def first(count: int, stream: AsyncIterator[bytes]) -> list[str]:
    return [(await anext(stream)).decode() for _ in range(count)]


def test_each_message_has_number_type_and_data_of_its_event(backend: Backend, job_id: str) -> None:
    retry, queued, started = asyncio.run(first(3, events._stream(backend, job_id, 0)))
    assert retry == "retry: 2000\n\n"
    fields = dict(line.split(": ", 1) for line in started.strip().splitlines())
    assert (fields["id"], fields["event"]) == ("2", "stage.started")
    assert json.loads(fields["data"]) | {"at": ""} == {
        "seq": 2,
        "at": "",
        "type": "stage.started",
        "data": {"stage": "profile", "attempt": 1},
    }
    assert "id: 1" in queued


def test_a_stream_that_is_idle_sends_comments(
    backend: Backend, job_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "KEEP_ALIVE_SECONDS", 0.05)
    messages = asyncio.run(first(3, events._stream(backend, job_id, 2)))
    assert messages[1:] == [": keep-alive\n\n"] * 2


def test_a_stream_ends_with_the_last_event_of_its_job(backend: Backend, job_id: str) -> None:
    async def read() -> list[str]:
        stream = events._stream(backend, job_id, 2)
        found = await first(1, stream)
        backend.jobs.end(job_id, 1, Status.FAILED, error={"type": "x"})
        return found + [message.decode() async for message in stream]

    _, last = asyncio.run(read())
    assert "event: job.failed" in last


def test_a_server_that_stops_asks_the_client_to_reconnect(backend: Backend, job_id: str) -> None:
    backend.is_stopping = lambda: True

    async def read() -> list[str]:
        return [message.decode() async for message in events._stream(backend, job_id, 0)]

    assert asyncio.run(read()) == ["retry: 2000\n\n", "event: bye\ndata: {}\n\n"]
