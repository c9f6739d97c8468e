"""The only ways in which the row of a job changes.

Every change is one transaction: it raises the row's version, records an event of that number, and
adds a delivery for each webhook that subscribed to the event. So whoever has seen version n has
seen all events up to n.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from service.records.job import Event, Job
from service.records.outbox import add_deliveries
from service.records.tables import events, jobs, stage_runs


def change(
    connection: sa.Connection,
    job_id: str,
    event: str,
    data: Mapping[str, Any],
    conditions: Sequence[sa.ColumnElement[bool]],
    changes: Mapping[str, Any],
) -> Job | None:
    """Change a job's row where the conditions hold, with its event and deliveries.

    Return the job after the change, or None where a condition does not hold.
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
    record_event(connection, job, event, data)
    return job


def record_event(connection: sa.Connection, job: Job, event: str, data: Mapping[str, Any]) -> None:
    """Record the event that led to a job's version, and add its deliveries."""
    now = time.time()
    values = {"job_id": job.id, "seq": job.version, "at": now, "type": event, "data": dict(data)}
    connection.execute(sa.insert(events).values(**values))
    delivered = Event(job.version, now, event, {"status": job.status, **data})
    add_deliveries(connection, job.tenant, job.id, delivered)


def record_stage_start(
    connection: sa.Connection, job_id: str, attempt: int, stage: str, worker: str
) -> None:
    """Record a start of a stage. A stage that starts again keeps the time of its first start."""
    run = (
        stage_runs.c.job_id == job_id,
        stage_runs.c.attempt == attempt,
        stage_runs.c.stage == stage,
    )
    again = connection.execute(
        sa.update(stage_runs).where(*run).values(worker=worker, starts=stage_runs.c.starts + 1)
    )
    if again.rowcount:
        return
    values = {
        "job_id": job_id,
        "attempt": attempt,
        "stage": stage,
        "worker": worker,
        "started_at": time.time(),
        "starts": 1,
    }
    connection.execute(sa.insert(stage_runs).values(**values))
