"""What a worker does between jobs: recover those of dead workers, and remove expired ones."""

import logging
import time
from dataclasses import dataclass, field

import sqlalchemy as sa

from service.errors import StageKilled
from service.problems import problem_of
from service.records.engine import EngineClient, Workflow, workflow_id
from service.records.job import ACTIVE, Job, Status
from service.records.job_store import JobStore
from service.records.removal import remove_job
from service.records.tables import jobs, tenants
from service.settings import ServiceSettings
from service.storage.artifact_store import ArtifactStore
from service.worker.worker_lock import WorkerLock

DEAD_SECONDS = 10.0
"""A worker counts as dead if its lock is free twice, so long apart.

Between the two it may take a lock again that it has lost.
"""

_DAY_SECONDS = 86400.0
_MAX_ROWS = 500

log = logging.getLogger("bitwright.housekeeping")


@dataclass(slots=True)
class Housekeeper:
    """Looks after jobs that no worker looks after.

    Attributes:
        store: where jobs are recorded.
        client: asks the engine about workflows.
        lock: shows which workers are dead.
        artifacts: where results are stored.
        settings: the worker's.
    """

    store: JobStore
    client: EngineClient
    lock: WorkerLock
    artifacts: ArtifactStore
    settings: ServiceSettings
    _first_free: dict[str, float] = field(default_factory=dict)

    def recover(self) -> None:
        """Queue the jobs of dead workers again, and end jobs that nothing runs any more."""
        by_worker: dict[str, list[Workflow]] = {}
        for workflow in self.client.running():
            if workflow.worker not in (None, self.settings.worker):
                by_worker.setdefault(str(workflow.worker), []).append(workflow)
        for worker in sorted(by_worker):
            self._take_over(worker, by_worker[worker])
        self._end_lost()

    def _take_over(self, worker: str, workflows: list[Workflow]) -> None:
        now = time.monotonic()
        with self.lock.holding_if_dead(worker) as is_free:
            if not is_free:
                self._first_free.pop(worker, None)
            elif now - self._first_free.setdefault(worker, now) >= DEAD_SECONDS:
                log.warning(
                    "worker %s is dead; %d of its jobs are queued again", worker, len(workflows)
                )
                for workflow in workflows:
                    self.client.requeue(workflow)

    def _end_lost(self) -> None:
        """End jobs whose workflow has finished without recording it.

        This should not happen; it repairs the record if it does.
        """
        query = (
            sa.select(jobs)
            .where(jobs.c.status.in_((Status.RUNNING, Status.CANCELLING)))
            .order_by(jobs.c.id)
            .limit(_MAX_ROWS)
        )
        with self.store.engine.connect() as connection:
            active = [Job.of(row) for row in connection.execute(query)]
        workflows = self.client.workflows([workflow_id(job.id, job.attempt) for job in active])
        for job in active:
            workflow = workflows.get(workflow_id(job.id, job.attempt))
            if workflow is None or workflow.is_unfinished:
                continue
            error = problem_of(
                StageKilled("the engine ended the job without a result; see the worker's log")
            )
            if self.store.end(job.id, job.attempt, Status.FAILED, error=error) is not None:
                log.error("job %s had ended in the engine only", job.id)

    def remove_expired(self) -> None:
        """Remove jobs that ended longer ago than their tenant keeps them."""
        keep_days = sa.func.coalesce(tenants.c.keep_days, self.settings.keep_days)
        is_old = jobs.c.finished_at < time.time() - keep_days * _DAY_SECONDS
        query = (
            sa.select(jobs)
            .outerjoin(tenants, tenants.c.name == jobs.c.tenant)
            .where(jobs.c.status.not_in(ACTIVE), is_old)
            .limit(_MAX_ROWS)
        )
        with self.store.engine.connect() as connection:
            expired = [Job.of(row) for row in connection.execute(query)]
        for job in expired:
            log.info("job has expired", extra={"job_id": job.id, "tenant": job.tenant})
            remove_job(self.store.engine, self.client, self.artifacts, job)
