"""A job, its status, and the events of its life.

queued -> running -> succeeded | failed | cancelled
running -> cancelling -> cancelled
queued -> cancelled
failed, cancelled -> queued, by a retry
"""

from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """Status of a job."""

    QUEUED = "queued"
    RUNNING = "running"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Whether nothing more happens without a request."""
        return self not in ACTIVE


ACTIVE = (Status.QUEUED, Status.RUNNING, Status.CANCELLING)


@dataclass(frozen=True, slots=True)
class Job:
    """A row of the table `jobs`.

    Attributes:
        id: starts with the time, so that ids sort by creation.
        tenant: who owns it.
        name: what the tenant calls it.
        request: its options, as JSON values.
        priority: lower numbers run first.
        parent: the job that it was forked from.
        profile: digest of the profile that it uses or has measured.
        idempotency_key: of its submission.
        body_sha256: hash of everything that decides the job.
        status: see `Status`.
        stage: the stage that runs, or ran last.
        progress: of that stage.
        attempt: 1, and one more for each retry.
        version: number of its newest event.
        worker: who runs it, or ran it last.
        result: figures of a job that succeeded.
        error: problem document of a job that failed.
        stored_bytes: size of its artifacts.
        created_at: seconds since 1970, UTC, as are the next two.
        started_at: when its first stage started.
        finished_at: when it ended.
    """

    id: str
    tenant: str
    name: str
    request: dict[str, Any]
    priority: int
    parent: str | None
    profile: str | None
    idempotency_key: str | None
    body_sha256: str
    status: Status
    stage: str | None
    progress: dict[str, Any] | None
    attempt: int
    version: int
    worker: str | None
    result: dict[str, Any] | None
    error: dict[str, Any] | None
    stored_bytes: int
    created_at: float
    started_at: float | None
    finished_at: float | None

    @classmethod
    def of(cls, row: Any) -> "Job":
        """Return the job of a row."""
        values = row._mapping  # noqa: SLF001  the documented way to read a row by name
        job = {field.name: values[field.name] for field in fields(cls)}
        return cls(**job | {"status": Status(values["status"])})


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a job.

    Attributes:
        seq: the job's version since then.
        at: seconds since 1970, UTC.
        type: such as `stage.started`.
        data: details, as JSON values.
    """

    seq: int
    at: float
    type: str
    data: dict[str, Any]
