"""What a worker does between jobs.

Takes over, ends what nothing runs, removes what is kept no longer.
"""

import logging
import time
from dataclasses import dataclass, field

import sqlalchemy as sa

from service.errors import StageKilled
from service.problems import problem_of
from service.records.database import jobs, tenants
from service.records.engine import Client, Workflow, workflow_id
from service.records.jobs import ACTIVE, Job, JobStore, Status
from service.records.removal import remove_job
from service.settings import ServiceSettings
from service.storage.artifact_store import ArtifactStore
from service.worker.liveness import Presence

GONE_SECONDS = 10.0
"""A worker counts as gone if its lock is free twice, so long apart.

It may be about to take it again.
"""

_DAY_SECONDS = 86400.0
_AT_ONCE = 500

log = logging.getLogger("bitwright.housekeeping")


@dataclass(slots=True)
class Housekeeper:
    """Looks after jobs that no worker looks after."""

    store: JobStore
    client: Client
    presence: Presence
    artifacts: ArtifactStore
    settings: ServiceSettings
    _missed: dict[str, float] = field(default_factory=dict)

    def tidy(self) -> None:
        """Take over the jobs of workers that are gone, and end jobs that nothing runs any more."""
        others = [
            workflow
            for workflow in self.client.held()
            if workflow.worker not in (None, self.settings.worker)
        ]
        for worker in sorted({str(workflow.worker) for workflow in others}):
            self._take_over(worker, [workflow for workflow in others if workflow.worker == worker])
        self._end_lost()

    def _take_over(self, worker: str, workflows: list[Workflow]) -> None:
        now = time.monotonic()
        with self.presence.absent(worker) as absent:
            if not absent:
                self._missed.pop(worker, None)
            elif now - self._missed.setdefault(worker, now) >= GONE_SECONDS:
                log.warning(
                    "worker %s is gone; %d of its jobs are queued again", worker, len(workflows)
                )
                for workflow in workflows:
                    self.client.release(workflow)

    def _end_lost(self) -> None:
        """End jobs whose workflow has ended without putting that on record.

        This repairs what should not happen.
        """
        with self.store.engine.connect() as connection:
            query = (
                sa.select(jobs)
                .where(jobs.c.status.in_((Status.RUNNING, Status.CANCELLING)))
                .order_by(jobs.c.id)
                .limit(_AT_ONCE)
            )
            active = [Job.of(row) for row in connection.execute(query)]
        known = self.client.workflows([workflow_id(job.id, job.attempt) for job in active])
        for job in active:
            workflow = known.get(workflow_id(job.id, job.attempt))
            if workflow is None or workflow.goes_on:
                continue
            error = problem_of(
                StageKilled("the engine ended the job without a result; the worker's log says more")
            )
            if self.store.end(job.id, job.attempt, Status.FAILED, error=error) is not None:
                log.error("job %s had ended in the engine only", job.id)

    def retain(self) -> None:
        """Remove jobs that ended longer ago than their tenant keeps them."""
        keep = sa.func.coalesce(tenants.c.keep_days, self.settings.keep_days)
        old = jobs.c.finished_at < time.time() - keep * _DAY_SECONDS
        query = (
            sa.select(jobs)
            .outerjoin(tenants, tenants.c.name == jobs.c.tenant)
            .where(jobs.c.status.not_in(ACTIVE), old)
        )
        with self.store.engine.connect() as connection:
            expired = [Job.of(row) for row in connection.execute(query.limit(_AT_ONCE))]
        for job in expired:
            log.info("job is kept no longer", extra={"job_id": job.id, "tenant": job.tenant})
            remove_job(self.store.engine, self.client, self.artifacts, job)
