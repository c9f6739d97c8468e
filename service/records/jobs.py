"""Jobs as rows: what a job is, and how it goes from one status to the next.

    queued -> running -> succeeded | failed | cancelled
    running -> cancelling -> cancelled         queued -> cancelled         failed, cancelled -> queued, by a retry

Every change is one transaction that raises the row's version, keeps an event of that number, and
leaves a delivery for each webhook that wants it. So whoever has seen version n has seen all events
up to n.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

import sqlalchemy as sa

from service.errors import JobUnknown
from service.ids import is_id
from service.records.database import events, jobs, log_lines, stage_runs
from service.records.outbox import leave_deliveries
from service.records.profile_owners import hold

MOST_LOG_LINES = 20_000
"""Lines that are kept of one job's log.

What comes later is dropped, as a model that warns at each token would fill the disk.
"""


class Status(StrEnum):
    """Where a job stands."""

    QUEUED = "queued"
    RUNNING = "running"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Whether nothing more happens by itself."""
        return self in _ENDED


_ENDED = (Status.SUCCEEDED, Status.FAILED, Status.CANCELLED)
ACTIVE = (Status.QUEUED, Status.RUNNING, Status.CANCELLING)


@dataclass(frozen=True, slots=True)
class Job:
    """A row of the table `jobs`, see there; `status` is one of `Status`."""

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
        data: more of it, as JSON values.
    """

    seq: int
    at: float
    type: str
    data: dict[str, Any]


class JobStore:
    """Jobs in the database. Each call is one transaction."""

    def __init__(self, engine: sa.Engine) -> None:
        """Use the tables behind `engine`."""
        self.engine = engine

    def get(self, job_id: str, tenant: str | None = None) -> Job:
        """Return a job, of one tenant if one is given.

        Raises:
            JobUnknown: it is not there, or another tenant's.
        """
        row = None
        if is_id(job_id):
            with self.engine.connect() as connection:
                row = connection.execute(sa.select(jobs).where(jobs.c.id == job_id)).one_or_none()
        if row is None or tenant not in (None, row.tenant):
            raise JobUnknown(f"there is no job {job_id[:80]!r}; list them, or submit one")
        return Job.of(row)

    def events(self, job_id: str, after: int, limit: int) -> list[Event]:
        """Return events in order, those that came after number `after`."""
        query = (
            sa.select(events)
            .where(events.c.job_id == job_id, events.c.seq > after)
            .order_by(events.c.seq)
            .limit(limit)
        )
        with self.engine.connect() as connection:
            return [Event(row.seq, row.at, row.type, row.data) for row in connection.execute(query)]

    def log(self, job_id: str, after: int, limit: int) -> list[tuple[int, float, str, str]]:
        """Return lines of the log in order, (number, at, stage, text), those after number `after`."""
        query = (
            sa.select(log_lines)
            .where(log_lines.c.job_id == job_id, log_lines.c.id > after)
            .order_by(log_lines.c.id)
        )
        with self.engine.connect() as connection:
            return [
                (row.id, row.at, row.stage, row.text)
                for row in connection.execute(query.limit(limit))
            ]

    def last_line(self, job_id: str) -> int:
        """Return the number of the last line of a job's log, 0 where there is none."""
        with self.engine.connect() as connection:
            return (
                connection.execute(
                    sa.select(sa.func.max(log_lines.c.id)).where(log_lines.c.job_id == job_id)
                ).scalar()
                or 0
            )

    def stages(self, job_id: str) -> list[dict[str, Any]]:
        """Return the stages that were begun, in order, with attempt, worker, starts and times."""
        query = (
            sa.select(stage_runs)
            .where(stage_runs.c.job_id == job_id)
            .order_by(stage_runs.c.started_at)
        )
        with self.engine.connect() as connection:
            return [dict(row._mapping) for row in connection.execute(query)]  # noqa: SLF001

    def begin_stage(self, job_id: str, attempt: int, stage: str, worker: str) -> Job | None:
        """Note that a worker begins a stage.

        None if the job is to stop, has ended, or is at another attempt.
        """
        now = time.time()
        with self.engine.begin() as connection:
            started = sa.func.coalesce(jobs.c.started_at, now)
            going = jobs.c.status.in_((Status.QUEUED, Status.RUNNING)), jobs.c.attempt == attempt
            changes = {
                "status": Status.RUNNING,
                "stage": stage,
                "worker": worker,
                "started_at": started,
                "progress": None,
            }
            job = change(
                connection,
                job_id,
                "stage.started",
                {"stage": stage, "attempt": attempt},
                going,
                changes,
            )
            if job is not None:
                begin_run(connection, job_id, attempt, stage, worker, now)
            return job

    def progress(self, job_id: str, attempt: int, data: Mapping[str, Any]) -> None:
        """Note how far the stage at hand is."""
        with self.engine.begin() as connection:
            going = jobs.c.status == Status.RUNNING, jobs.c.attempt == attempt
            change(connection, job_id, "stage.progress", data, going, {"progress": dict(data)})

    def end_stage(self, job_id: str, attempt: int, stage: str, found: Mapping[str, Any]) -> None:
        """Note that a stage was finished, and what it found.

        The profile that it measured becomes the job's.
        """
        changes = {"profile": found["profile"]} if "profile" in found else {}
        with self.engine.begin() as connection:
            going = (
                jobs.c.status.in_((Status.RUNNING, Status.CANCELLING)),
                jobs.c.attempt == attempt,
            )
            job = change(
                connection, job_id, "stage.finished", {"stage": stage, **found}, going, changes
            )
            if job is not None and "profile" in found:
                hold(connection, job.tenant, found["profile"])
            run = (
                stage_runs.c.job_id == job_id,
                stage_runs.c.attempt == attempt,
                stage_runs.c.stage == stage,
            )
            connection.execute(sa.update(stage_runs).where(*run).values(finished_at=time.time()))

    def end(
        self,
        job_id: str,
        attempt: int,
        status: Status,
        *,
        result: Mapping[str, Any] | None = None,
        error: Mapping[str, Any] | None = None,
        stored_bytes: int = 0,
    ) -> Job | None:
        """End a job; None if it has ended, or is at another attempt.

        One that was to be cancelled is, unless it succeeded.
        """
        with self.engine.begin() as connection:
            going = jobs.c.status.in_(ACTIVE), jobs.c.attempt == attempt
            cancelling = (
                connection.execute(sa.select(jobs.c.status).where(jobs.c.id == job_id)).scalar()
                == Status.CANCELLING
            )
            if cancelling and status is Status.FAILED:
                status, error = Status.CANCELLED, None
            data: dict[str, Any] = {"error": dict(error)} if error else {}
            changes = {
                "status": status,
                "finished_at": time.time(),
                "progress": None,
                "error": error,
                "result": result,
            }
            return change(
                connection,
                job_id,
                f"job.{status}",
                data,
                going,
                changes | {"stored_bytes": stored_bytes},
            )

    def is_to_stop(self, job_id: str, attempt: int) -> bool:
        """Return whether a stage that runs for this attempt should be stopped."""
        with self.engine.connect() as connection:
            row = connection.execute(
                sa.select(jobs.c.status, jobs.c.attempt).where(jobs.c.id == job_id)
            ).one_or_none()
        return row is None or row.status != Status.RUNNING or row.attempt != attempt

    def write_log(self, job_id: str, stage: str, lines: Sequence[str]) -> None:
        """Keep lines of a stage's messages."""
        now = time.time()
        with self.engine.begin() as connection:
            kept = connection.execute(
                sa.select(sa.func.count()).where(log_lines.c.job_id == job_id)
            ).scalar_one()
            rows = [{"job_id": job_id, "at": now, "stage": stage, "text": line} for line in lines][
                : MOST_LOG_LINES - kept
            ]
            if (
                rows
                and connection.execute(
                    sa.select(jobs.c.id).where(jobs.c.id == job_id)
                ).one_or_none()
            ):
                connection.execute(sa.insert(log_lines), rows)


def change(
    connection: sa.Connection,
    job_id: str,
    event: str,
    data: Mapping[str, Any],
    conditions: Sequence[sa.ColumnElement[bool]],
    changes: Mapping[str, Any],
) -> Job | None:
    """Change a job's row where the conditions hold, with its event and deliveries.

    Return it as it is then, else None.
    """
    update = (
        sa.update(jobs)
        .where(jobs.c.id == job_id, *conditions)
        .values(version=jobs.c.version + 1, **changes)
    )
    row = connection.execute(update.returning(*jobs.c)).one_or_none()
    if row is None:
        return None
    job = Job.of(row)
    keep_event(connection, job, event, data)
    return job


def keep_event(connection: sa.Connection, job: Job, event: str, data: Mapping[str, Any]) -> None:
    """Keep the event that made a job's version what it is, and leave its deliveries."""
    now = time.time()
    connection.execute(
        sa.insert(events).values(
            job_id=job.id, seq=job.version, at=now, type=event, data=dict(data)
        )
    )
    leave_deliveries(
        connection, job.tenant, job.id, job.version, event, {"status": job.status, **data}, now
    )


def begin_run(
    connection: sa.Connection, job_id: str, attempt: int, stage: str, worker: str, now: float
) -> None:
    """Note a start of a stage; one that is begun again keeps when it was first."""
    run = (
        stage_runs.c.job_id == job_id,
        stage_runs.c.attempt == attempt,
        stage_runs.c.stage == stage,
    )
    again = connection.execute(
        sa.update(stage_runs).where(*run).values(worker=worker, starts=stage_runs.c.starts + 1)
    )
    if not again.rowcount:
        values = {
            "job_id": job_id,
            "attempt": attempt,
            "stage": stage,
            "worker": worker,
            "started_at": now,
            "starts": 1,
        }
        connection.execute(sa.insert(stage_runs).values(**values))
