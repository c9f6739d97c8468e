"""What tenants do with jobs: submit, cancel, retry and list. Each is one transaction."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from service.errors import JobActive, JobEnded, KeyReused
from service.failpoint import failpoint
from service.ids import new_id
from service.records.job import Job, Status
from service.records.job_changes import change, record_event
from service.records.job_store import JobStore
from service.records.quota import Quota, check_quota
from service.records.submission import PRIORITIES, Submission
from service.records.tables import jobs, labels


class Enqueue(Protocol):
    """How a job is handed to the engine, in the transaction that inserts or changes its row."""

    def __call__(
        self,
        connection: sa.Connection,
        job_id: str,
        attempt: int,
        first_stage: str | None,
        priority: int,
    ) -> None:
        """Queue the job's stages from `first_stage` on; None is the first of all."""
        ...


@dataclass(frozen=True, slots=True)
class Page:
    """Part of a list of jobs, and whether more follow."""

    rows: Sequence[Job]
    has_more: bool


class JobService:
    """Accepts what tenants ask for."""

    def __init__(self, store: JobStore, enqueue: Enqueue, default: Quota) -> None:
        """Keep jobs in `store`, and hand them to `enqueue`.

        `default` is the quota of tenants without one of their own.
        """
        self._store = store
        self._engine = store.engine
        self._enqueue = enqueue
        self._default = default

    def submit(self, submission: Submission) -> tuple[Job, bool]:
        """Insert a job and queue it; return it and whether it is new.

        Raises:
            KeyReused: the key belongs to a job with another body.
            QuotaExceeded: the tenant has as many jobs or bytes as it may have.
        """
        try:
            with self._engine.begin() as connection:
                job = self._insert(connection, submission)
                check_quota(connection, submission.tenant, self._default)
                record_event(connection, job, "job.queued", {"attempt": 1})
                self._enqueue(connection, job.id, 1, submission.first_stage, job.priority)
                failpoint("job-uncommitted")
        except IntegrityError:
            if submission.key is None:
                raise
            return self._earlier(submission), False
        failpoint("job-committed")
        return job, True

    def _insert(self, connection: sa.Connection, submission: Submission) -> Job:
        values = {
            "id": new_id("job"),
            "tenant": submission.tenant,
            "name": submission.name,
            "request": dict(submission.request),
            "priority": PRIORITIES[submission.priority],
            "parent": submission.parent,
            "profile": submission.profile,
            "idempotency_key": submission.key,
            "body_sha256": submission.body_sha256,
            "status": Status.QUEUED,
            "attempt": 1,
            "version": 1,
            "stored_bytes": 0,
            "created_at": time.time(),
        }
        insert = sa.insert(jobs).values(**values).returning(*jobs.c)
        job = Job.of(connection.execute(insert).one())
        rows = [
            {"job_id": job.id, "name": name, "value": value}
            for name, value in (submission.labels or {}).items()
        ]
        if rows:
            connection.execute(sa.insert(labels), rows)
        return job

    def _earlier(self, submission: Submission) -> Job:
        """Return the job that was submitted with the same idempotency key."""
        same_key = jobs.c.tenant == submission.tenant, jobs.c.idempotency_key == submission.key
        with self._engine.connect() as connection:
            job = Job.of(connection.execute(sa.select(jobs).where(*same_key)).one())
        if job.body_sha256 != submission.body_sha256:
            raise KeyReused(
                f"idempotency key {submission.key!r} was used for job {job.id} with another body; "
                "use a new key"
            )
        return job

    def cancel(self, tenant: str, job_id: str) -> Job:
        """Cancel a job: at once if it is queued, else as soon as its stage is stopped.

        Cancelling again is harmless.

        Raises:
            JobUnknown: it does not exist.
            JobEnded: it has succeeded or failed.
        """
        self._store.get(job_id, tenant)
        is_queued = (jobs.c.status == Status.QUEUED,)
        is_running = (jobs.c.status == Status.RUNNING,)
        end = {"status": Status.CANCELLED, "finished_at": time.time()}
        stop = {"status": Status.CANCELLING}
        with self._engine.begin() as connection:
            job = change(connection, job_id, "job.cancelled", {}, is_queued, end)
            if job is None:
                job = change(connection, job_id, "job.cancelling", {}, is_running, stop)
        if job is None:
            job = self._store.get(job_id, tenant)
            if job.status in (Status.SUCCEEDED, Status.FAILED):
                raise JobEnded(f"job {job_id} has {job.status} already; there is nothing to cancel")
        return job

    def retry(self, tenant: str, job_id: str) -> Job:
        """Queue a job that failed or was cancelled again, from the stage that did not finish.

        Raises:
            JobUnknown: it does not exist.
            JobActive: it has not ended, or has succeeded.
            QuotaExceeded: the tenant has as many jobs or bytes as it may have.
        """
        attempt = self._store.get(job_id, tenant).attempt + 1
        is_over = (jobs.c.status.in_((Status.FAILED, Status.CANCELLED)),)
        reset = {
            "status": Status.QUEUED,
            "attempt": jobs.c.attempt + 1,
            "error": None,
            "finished_at": None,
            "progress": None,
        }
        with self._engine.begin() as connection:
            job = change(connection, job_id, "job.queued", {"attempt": attempt}, is_over, reset)
            if job is None:
                status = self._store.get(job_id, tenant).status
                raise JobActive(
                    f"job {job_id} is {status}; only jobs that failed or were cancelled can be "
                    "retried"
                )
            check_quota(connection, tenant, self._default)
            self._enqueue(connection, job_id, job.attempt, job.stage, job.priority)
        return job

    def page(
        self,
        tenant: str,
        *,
        status: str | None,
        label: tuple[str, str] | None,
        after: str | None,
        limit: int,
    ) -> Page:
        """Return jobs, the newest first: at most `limit`, those older than job `after`."""
        query = sa.select(jobs).where(jobs.c.tenant == tenant)
        if status is not None:
            query = query.where(jobs.c.status == status)
        if after is not None:
            query = query.where(jobs.c.id < after)
        if label is not None:
            name, value = label
            has_label = sa.exists().where(
                labels.c.job_id == jobs.c.id, labels.c.name == name, labels.c.value == value
            )
            query = query.where(has_label)
        # one row more than the page holds says whether another page follows
        query = query.order_by(jobs.c.id.desc()).limit(limit + 1)
        with self._engine.connect() as connection:
            rows = [Job.of(row) for row in connection.execute(query)]
        return Page(rows[:limit], len(rows) > limit)

    def labels(self, job_ids: list[str]) -> dict[str, dict[str, str]]:
        """Return the labels of jobs, by job."""
        by_job: dict[str, dict[str, str]] = {job_id: {} for job_id in job_ids}
        query = sa.select(labels).where(labels.c.job_id.in_(job_ids))
        with self._engine.connect() as connection:
            for row in connection.execute(query):
                by_job[row.job_id][row.name] = row.value
        return by_job
