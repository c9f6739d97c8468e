"""Jobs in the database, as the API reads them and a worker changes them."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from service.errors import JobUnknown
from service.ids import is_id
from service.records.job import ACTIVE, Event, Job, Status
from service.records.job_changes import change, record_stage_start
from service.records.profile_owners import add_owner
from service.records.tables import events, jobs, log_lines, stage_runs

MAX_LOG_LINES = 20_000
"""Lines that are kept of one job's log; later ones are dropped.

A model that warns at each token would fill the disk.
"""


class JobStore:
    """Jobs in the database. Each call is one transaction."""

    def __init__(self, engine: sa.Engine) -> None:
        """Use the tables behind `engine`."""
        self.engine = engine

    def get(self, job_id: str, tenant: str | None = None) -> Job:
        """Return a job, of one tenant if one is given.

        Raises:
            JobUnknown: it does not exist, or is another tenant's.
        """
        row = None
        if is_id(job_id):
            with self.engine.connect() as connection:
                row = connection.execute(sa.select(jobs).where(jobs.c.id == job_id)).one_or_none()
        if row is None or tenant not in (None, row.tenant):
            raise JobUnknown(f"there is no job {job_id[:80]!r}; list them, or submit one")
        return Job.of(row)

    def events(self, job_id: str, after: int, limit: int) -> list[Event]:
        """Return events in order: at most `limit` of those after number `after`."""
        query = (
            sa.select(events)
            .where(events.c.job_id == job_id, events.c.seq > after)
            .order_by(events.c.seq)
            .limit(limit)
        )
        with self.engine.connect() as connection:
            return [Event(row.seq, row.at, row.type, row.data) for row in connection.execute(query)]

    def log(self, job_id: str, after: int, limit: int) -> list[tuple[int, float, str, str]]:
        """Return lines of the log in order: at most `limit` of those after number `after`.

        Each is (number, seconds since 1970, stage, text).
        """
        query = (
            sa.select(log_lines)
            .where(log_lines.c.job_id == job_id, log_lines.c.id > after)
            .order_by(log_lines.c.id)
            .limit(limit)
        )
        with self.engine.connect() as connection:
            return [(row.id, row.at, row.stage, row.text) for row in connection.execute(query)]

    def last_line(self, job_id: str) -> int:
        """Return the number of the last line of a job's log, 0 where there is none."""
        query = sa.select(sa.func.max(log_lines.c.id)).where(log_lines.c.job_id == job_id)
        with self.engine.connect() as connection:
            return connection.execute(query).scalar() or 0

    def stages(self, job_id: str) -> list[dict[str, Any]]:
        """Return the stages that were started, in order, with attempt, worker, starts and times."""
        query = (
            sa.select(stage_runs)
            .where(stage_runs.c.job_id == job_id)
            .order_by(stage_runs.c.started_at)
        )
        with self.engine.connect() as connection:
            return [dict(row._mapping) for row in connection.execute(query)]  # noqa: SLF001

    def start_stage(self, job_id: str, attempt: int, stage: str, worker: str) -> Job | None:
        """Record that a worker starts a stage.

        Return None if the job is to stop, has ended, or is at another attempt.
        """
        conditions = jobs.c.status.in_((Status.QUEUED, Status.RUNNING)), jobs.c.attempt == attempt
        changes = {
            "status": Status.RUNNING,
            "stage": stage,
            "worker": worker,
            "started_at": sa.func.coalesce(jobs.c.started_at, time.time()),
            "progress": None,
        }
        data = {"stage": stage, "attempt": attempt}
        with self.engine.begin() as connection:
            job = change(connection, job_id, "stage.started", data, conditions, changes)
            if job is not None:
                record_stage_start(connection, job_id, attempt, stage, worker)
            return job

    def progress(self, job_id: str, attempt: int, data: Mapping[str, Any]) -> None:
        """Record the progress of the stage that runs."""
        conditions = jobs.c.status == Status.RUNNING, jobs.c.attempt == attempt
        with self.engine.begin() as connection:
            changes = {"progress": dict(data)}
            change(connection, job_id, "stage.progress", data, conditions, changes)

    def end_stage(self, job_id: str, attempt: int, stage: str, outcome: Mapping[str, Any]) -> None:
        """Record that a stage has finished, and its outcome.

        A profile that it measured becomes the job's, and its tenant an owner of it.
        """
        going_on = jobs.c.status.in_((Status.RUNNING, Status.CANCELLING))
        conditions = going_on, jobs.c.attempt == attempt
        data = {"stage": stage, **outcome}
        changes = {"profile": outcome["profile"]} if "profile" in outcome else {}
        with self.engine.begin() as connection:
            job = change(connection, job_id, "stage.finished", data, conditions, changes)
            if job is not None and "profile" in outcome:
                add_owner(connection, job.tenant, outcome["profile"])
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
        """End a job; return None if it has ended before, or is at another attempt.

        A job whose cancellation was requested ends as cancelled, unless it succeeded. Only a job
        that was started can succeed.
        """
        before = (Status.RUNNING, Status.CANCELLING) if status is Status.SUCCEEDED else ACTIVE
        conditions = jobs.c.status.in_(before), jobs.c.attempt == attempt
        current = sa.select(jobs.c.status).where(jobs.c.id == job_id)
        with self.engine.begin() as connection:
            is_cancelling = connection.execute(current).scalar() == Status.CANCELLING
            if is_cancelling and status is Status.FAILED:
                status = Status.CANCELLED
                error = None
            changes = {
                "status": status,
                "finished_at": time.time(),
                "progress": None,
                "error": error,
                "result": result,
                "stored_bytes": stored_bytes,
            }
            data: dict[str, Any] = {"error": dict(error)} if error else {}
            return change(connection, job_id, f"job.{status}", data, conditions, changes)

    def must_stop(self, job_id: str, attempt: int) -> bool:
        """Return whether a stage that runs for this attempt has to be stopped."""
        query = sa.select(jobs.c.status, jobs.c.attempt).where(jobs.c.id == job_id)
        with self.engine.connect() as connection:
            row = connection.execute(query).one_or_none()
        return row is None or row.status != Status.RUNNING or row.attempt != attempt

    def write_log(self, job_id: str, stage: str, lines: Sequence[str]) -> None:
        """Append lines to a job's log, up to `MAX_LOG_LINES`."""
        now = time.time()
        count = sa.select(sa.func.count()).where(log_lines.c.job_id == job_id)
        exists = sa.select(jobs.c.id).where(jobs.c.id == job_id)
        rows = [{"job_id": job_id, "at": now, "stage": stage, "text": line} for line in lines]
        with self.engine.begin() as connection:
            rows = rows[: MAX_LOG_LINES - connection.execute(count).scalar_one()]
            if rows and connection.execute(exists).one_or_none():
                connection.execute(sa.insert(log_lines), rows)
