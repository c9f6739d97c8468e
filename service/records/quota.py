"""What a tenant may have."""

from dataclasses import dataclass

import sqlalchemy as sa

from service.errors import QuotaExceeded
from service.records.job import ACTIVE
from service.records.tables import jobs, tenants


@dataclass(frozen=True, slots=True)
class Quota:
    """What a tenant may have; None is no limit.

    Attributes:
        active_jobs: jobs that have not ended.
        stored_bytes: size of the artifacts of all its jobs.
        keep_days: days for which a job that has ended is kept.
    """

    active_jobs: int | None = None
    stored_bytes: int | None = None
    keep_days: float | None = None


def set_quota(engine: sa.Engine, tenant: str, quota: Quota) -> None:
    """Give a tenant its own quota. What is None in it is as for all tenants."""
    values = {
        "most_active_jobs": quota.active_jobs,
        "most_stored_bytes": quota.stored_bytes,
        "keep_days": quota.keep_days,
    }
    update = sa.update(tenants).where(tenants.c.name == tenant).values(**values)
    with engine.begin() as connection:
        if not connection.execute(update).rowcount:
            connection.execute(sa.insert(tenants).values(name=tenant, **values))


def quota_of(connection: sa.Connection, tenant: str, default: Quota) -> Quota:
    """Return a tenant's quota: its own limits, and those of `default` where it has none."""
    row = connection.execute(sa.select(tenants).where(tenants.c.name == tenant)).one_or_none()
    if row is None:
        return default
    return Quota(
        default.active_jobs if row.most_active_jobs is None else row.most_active_jobs,
        default.stored_bytes if row.most_stored_bytes is None else row.most_stored_bytes,
        default.keep_days if row.keep_days is None else row.keep_days,
    )


def check_quota(connection: sa.Connection, tenant: str, default: Quota) -> None:
    """Refuse the job that was just inserted or queued again if it exceeds its tenant's quota.

    Raises:
        QuotaExceeded: it does.
    """
    quota = quota_of(connection, tenant, default)
    own = jobs.c.tenant == tenant
    if quota.active_jobs is not None:
        count = sa.select(sa.func.count()).where(own, jobs.c.status.in_(ACTIVE))
        if connection.execute(count).scalar_one() > quota.active_jobs:
            raise QuotaExceeded(
                f"tenant {tenant!r} has {quota.active_jobs} jobs that have not ended, its limit; "
                "wait for one to end"
            )
    if quota.stored_bytes is not None:
        total = sa.select(sa.func.sum(jobs.c.stored_bytes)).where(own)
        stored = connection.execute(total).scalar() or 0
        if stored >= quota.stored_bytes:
            raise QuotaExceeded(
                f"tenant {tenant!r} stores {stored:,} bytes of {quota.stored_bytes:,}, its limit; "
                "delete jobs that have ended"
            )
