"""What a tenant does with jobs: submit, cancel, retry, list, delete. Each is one transaction."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from service.errors import JobActive, JobEnded, KeyReused, QuotaExceeded
from service.failpoint import failpoint
from service.ids import new_id
from service.records.database import jobs, labels, tenants
from service.records.jobs import ACTIVE, Job, JobStore, Status, change, keep_event

T = TypeVar("T")


PRIORITIES = {"high": 10, "normal": 20, "low": 30}
"""Lower numbers go first."""


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """Part of a list, and whether more follows."""

    rows: Sequence[T]
    has_more: bool

    @classmethod
    def of(cls, rows: Sequence[T], limit: int) -> "Page[T]":
        """Return the page of at most `limit` rows out of one row more, if there is one."""
        return cls(rows[:limit], len(rows) > limit)


class Enqueue(Protocol):
    """How a job is handed to the engine, in the transaction that makes its row."""

    def __call__(
        self,
        connection: sa.Connection,
        job_id: str,
        attempt: int,
        first_stage: str | None,
        priority: int,
    ) -> None:
        """Have the job's stages run from `first_stage` on; None is the first of all."""
        ...


@dataclass(frozen=True, slots=True)
class Submission:
    """What a tenant asks for.

    Attributes:
        tenant: who asks.
        request: the job's options, as JSON values.
        name: what the tenant calls the job.
        labels: to find it by.
        priority: one of `PRIORITIES`.
        key: idempotency key; a second submission with it is the first one's job.
        profile: digest of a profile to use instead of measuring one.
        parent: the job that this one was forked from.
        first_stage: where it begins; None for the first stage.
    """

    tenant: str
    request: Mapping[str, Any]
    name: str = ""
    labels: Mapping[str, str] | None = None
    priority: str = "normal"
    key: str | None = None
    profile: str | None = None
    parent: str | None = None
    first_stage: str | None = None

    @property
    def body_sha256(self) -> str:
        """Hash of all that decides the job."""
        body: dict[str, Any] = {
            "request": dict(self.request),
            "name": self.name,
            "labels": dict(self.labels or {}),
        }
        body |= {
            "priority": self.priority,
            "profile": self.profile,
            "parent": self.parent,
            "first_stage": self.first_stage,
        }
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Quota:
    """What a tenant may have; None is no limit.

    Attributes:
        active_jobs: jobs that have not ended.
        stored_bytes: bytes of the artifacts of all its jobs.
        keep_days: days for which a job that has ended is kept.
    """

    active_jobs: int | None = None
    stored_bytes: int | None = None
    keep_days: float | None = None


class Desk:
    """Takes what tenants ask for."""

    def __init__(self, store: JobStore, enqueue: Enqueue, default: Quota) -> None:
        """Keep jobs in `store`, hand them to `enqueue`.

        `default` is the quota of tenants without one of their own.
        """
        self._store, self._engine, self._enqueue, self._default = (
            store,
            store.engine,
            enqueue,
            default,
        )

    def submit(self, asked: Submission) -> tuple[Job, bool]:
        """Make a job and queue it; return it and whether it is new.

        Raises:
            KeyReused: the key belongs to a job with another body.
            QuotaExceeded: the tenant has as many jobs or bytes as it may.
        """
        now = time.time()
        values = {
            "id": new_id("job"), "tenant": asked.tenant, "name": asked.name, "request": dict(asked.request),
            "priority": PRIORITIES[asked.priority], "parent": asked.parent, "profile": asked.profile,
            "idempotency_key": asked.key, "body_sha256": asked.body_sha256, "status": Status.QUEUED, "attempt": 1,
            "version": 1, "stored_bytes": 0, "created_at": now,
        }  # fmt: skip
        try:
            with self._engine.begin() as connection:
                job = Job.of(
                    connection.execute(sa.insert(jobs).values(**values).returning(*jobs.c)).one()
                )
                self._check_quota(connection, asked.tenant)
                rows = [
                    {"job_id": job.id, "name": name, "value": value}
                    for name, value in (asked.labels or {}).items()
                ]
                if rows:
                    connection.execute(sa.insert(labels), rows)
                keep_event(connection, job, "job.queued", {"attempt": 1})
                self._enqueue(connection, job.id, 1, asked.first_stage, job.priority)
                failpoint("job-uncommitted")
        except IntegrityError:
            if asked.key is None:
                raise
            return self._earlier(asked), False
        failpoint("job-committed")
        return job, True

    def _earlier(self, asked: Submission) -> Job:
        with self._engine.connect() as connection:
            mine = jobs.c.tenant == asked.tenant, jobs.c.idempotency_key == asked.key
            job = Job.of(connection.execute(sa.select(jobs).where(*mine)).one())
        if job.body_sha256 != asked.body_sha256:
            raise KeyReused(
                f"idempotency key {asked.key!r} was used for job {job.id} with another body; use "
                "a new key"
            )
        return job

    def _quota(self, connection: sa.Connection, tenant: str) -> Quota:
        row = connection.execute(sa.select(tenants).where(tenants.c.name == tenant)).one_or_none()
        own = (
            Quota()
            if row is None
            else Quota(row.most_active_jobs, row.most_stored_bytes, row.keep_days)
        )
        return Quota(
            self._default.active_jobs if own.active_jobs is None else own.active_jobs,
            self._default.stored_bytes if own.stored_bytes is None else own.stored_bytes,
            self._default.keep_days if own.keep_days is None else own.keep_days,
        )

    def _check_quota(self, connection: sa.Connection, tenant: str) -> None:
        """Refuse the job that was just put in if it is one too many."""
        quota = self._quota(connection, tenant)
        mine = jobs.c.tenant == tenant
        if quota.active_jobs is not None:
            active = connection.execute(
                sa.select(sa.func.count()).where(mine, jobs.c.status.in_(ACTIVE))
            ).scalar_one()
            if active > quota.active_jobs:
                raise QuotaExceeded(
                    f"tenant {tenant!r} has {quota.active_jobs} jobs that have not ended, its "
                    "most; wait for one"
                )
        if quota.stored_bytes is not None:
            stored = (
                connection.execute(sa.select(sa.func.sum(jobs.c.stored_bytes)).where(mine)).scalar()
                or 0
            )
            if stored >= quota.stored_bytes:
                raise QuotaExceeded(
                    f"tenant {tenant!r} stores {stored:,} bytes of {quota.stored_bytes:,} that it "
                    "may; delete jobs that ended"
                )

    def cancel(self, tenant: str, job_id: str) -> Job:
        """Cancel a job: at once if it is queued, else as soon as its stage is stopped.

        Cancelling again is harmless.

        Raises:
            JobUnknown: it is not there.
            JobEnded: it has ended already.
        """
        self._store.get(job_id, tenant)
        with self._engine.begin() as connection:
            waiting = (jobs.c.status == Status.QUEUED,)
            ended = {"status": Status.CANCELLED, "finished_at": time.time()}
            running = (jobs.c.status == Status.RUNNING,)
            job = change(connection, job_id, "job.cancelled", {}, waiting, ended) or change(
                connection, job_id, "job.cancelling", {}, running, {"status": Status.CANCELLING}
            )
        if job is None:
            job = self._store.get(job_id, tenant)
            if job.status in (Status.SUCCEEDED, Status.FAILED):
                raise JobEnded(f"job {job_id} has {job.status} already; there is nothing to cancel")
        return job

    def retry(self, tenant: str, job_id: str) -> Job:
        """Queue a job that failed or was cancelled again, from the stage that did not end.

        Raises:
            JobUnknown: it is not there.
            JobActive: it has not ended, or has succeeded.
        """
        before = self._store.get(job_id, tenant)
        with self._engine.begin() as connection:
            over = (jobs.c.status.in_((Status.FAILED, Status.CANCELLED)),)
            anew = {
                "status": Status.QUEUED,
                "attempt": jobs.c.attempt + 1,
                "error": None,
                "finished_at": None,
                "progress": None,
            }
            job = change(
                connection, job_id, "job.queued", {"attempt": before.attempt + 1}, over, anew
            )
            if job is None:
                status = self._store.get(job_id, tenant).status
                raise JobActive(
                    f"job {job_id} is {status}; only jobs that failed or were cancelled can be "
                    "tried again"
                )
            self._check_quota(connection, tenant)
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
    ) -> Page[Job]:
        """Return jobs, the newest first: at most `limit`, those older than job `after`."""
        query = sa.select(jobs).where(jobs.c.tenant == tenant)
        if status is not None:
            query = query.where(jobs.c.status == status)
        if after is not None:
            query = query.where(jobs.c.id < after)
        if label is not None:
            found = sa.exists().where(
                labels.c.job_id == jobs.c.id, labels.c.name == label[0], labels.c.value == label[1]
            )
            query = query.where(found)
        with self._engine.connect() as connection:
            rows = connection.execute(query.order_by(jobs.c.id.desc()).limit(limit + 1))
            return Page.of([Job.of(row) for row in rows], limit)

    def labels(self, job_ids: list[str]) -> dict[str, dict[str, str]]:
        """Return the labels of jobs."""
        found: dict[str, dict[str, str]] = {job_id: {} for job_id in job_ids}
        with self._engine.connect() as connection:
            for row in connection.execute(sa.select(labels).where(labels.c.job_id.in_(job_ids))):
                found[row.job_id][row.name] = row.value
        return found


def set_quota(engine: sa.Engine, tenant: str, quota: Quota) -> None:
    """Give a tenant a quota of its own; what is None in it is as for all."""
    values = {
        "most_active_jobs": quota.active_jobs,
        "most_stored_bytes": quota.stored_bytes,
        "keep_days": quota.keep_days,
    }
    with engine.begin() as connection:
        if not connection.execute(
            sa.update(tenants).where(tenants.c.name == tenant).values(**values)
        ).rowcount:
            connection.execute(sa.insert(tenants).values(name=tenant, **values))
