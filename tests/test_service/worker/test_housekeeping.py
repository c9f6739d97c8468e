"""Promises of service.worker.housekeeper, worker_lock and settings.

What is old goes, what is lost ends, names are held by who lives.
"""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from service.errors import JobUnknown, RequestError
from service.records.engine import EngineClient, workflow_id
from service.records.job import Status
from service.records.job_service import JobService
from service.records.job_store import JobStore
from service.records.quota import Quota, set_quota
from service.records.submission import Submission
from service.records.tables import jobs
from service.settings import ServiceSettings
from service.storage.artifact_store import ArtifactStore
from service.worker.housekeeper import Housekeeper
from service.worker.worker_lock import WorkerLock

DAY = 86400


@pytest.fixture
def keeper(database: sa.Engine, tmp_path: Path) -> Housekeeper:
    settings = ServiceSettings(
        data=tmp_path, cache=tmp_path, database_url=str(database.url), keep_days=10
    )
    return Housekeeper(
        JobStore(database),
        EngineClient(database),
        WorkerLock(database),
        ArtifactStore(settings.artifacts),
        settings,
    )


def ended_job(keeper: Housekeeper, tenant: str, days_ago: float) -> str:
    """Return a job that succeeded some days ago, with an artifact."""
    job_service = JobService(keeper.store, keeper.client.enqueue, Quota())
    job, _ = job_service.submit(
        Submission(tenant, {"model": "m", "budget": "3bpw"}, labels={"a": "b"})
    )
    keeper.store.start_stage(job.id, 1, "profile", "w")
    keeper.artifacts.put(f"jobs/{job.id}", {"plan.json": b"{}"})
    keeper.store.end(job.id, 1, Status.SUCCEEDED, result={})
    with keeper.store.engine.begin() as connection:
        connection.execute(
            sa.update(jobs)
            .where(jobs.c.id == job.id)
            .values(finished_at=time.time() - days_ago * DAY)
        )
    return job.id


def test_jobs_are_kept_as_long_as_their_tenant_may_and_then_go_with_everything(
    keeper: Housekeeper,
) -> None:
    set_quota(keeper.store.engine, "keeps", Quota(keep_days=100))
    old = ended_job(keeper, "me", 11)
    new = ended_job(keeper, "me", 9)
    kept = ended_job(keeper, "keeps", 50)
    waiting, _ = JobService(keeper.store, keeper.client.enqueue, Quota()).submit(
        Submission("me", {"model": "m", "budget": "3bpw"})
    )
    keeper.remove_expired()
    with pytest.raises(JobUnknown):
        keeper.store.get(old)
    assert not keeper.artifacts.exists(f"jobs/{old}")
    assert keeper.store.events(old, 0, 10) == []
    for job_id in (new, kept):
        assert keeper.store.get(job_id).status is Status.SUCCEEDED
        assert keeper.artifacts.exists(f"jobs/{job_id}")
    assert keeper.store.get(waiting.id).status is Status.QUEUED


def test_without_a_limit_nothing_is_removed(keeper: Housekeeper) -> None:
    old = ended_job(keeper, "me", 10_000)
    keeper.settings = keeper.settings.model_copy(update={"keep_days": None})
    keeper.remove_expired()
    assert keeper.store.get(old).status is Status.SUCCEEDED


def test_a_job_that_the_engine_lost_is_ended(keeper: Housekeeper) -> None:
    job_service = JobService(keeper.store, keeper.client.enqueue, Quota())
    job, _ = job_service.submit(Submission("me", {"model": "m", "budget": "3bpw"}))
    keeper.store.start_stage(job.id, 1, "profile", "w")
    keeper.recover()
    assert keeper.store.get(job.id).status is Status.RUNNING
    keeper.client._client.cancel_workflow(workflow_id(job.id, 1))
    keeper.recover()
    lost = keeper.store.get(job.id)
    assert lost.status is Status.FAILED
    assert lost.error is not None
    assert lost.error["type"] == "urn:bitwright:problem:stage-killed"


HOLD = """
import sys, time
from service.records.database import connect
from service.worker.worker_lock import WorkerLock
lock = WorkerLock(connect(sys.argv[1]))
lock.acquire('one')
print('held', flush=True)
time.sleep(60)
"""


def test_a_name_is_held_until_its_process_ends_however_it_ends(
    database: sa.Engine, database_url: str
) -> None:
    mine = WorkerLock(database)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, database_url], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with mine.holding_if_dead("one") as absent:
        assert not absent
    with pytest.raises(RequestError, match="runs already"):
        mine.acquire("one")
    holder.kill()
    holder.wait()
    holder.stdout.close()
    end = time.monotonic() + 10
    while time.monotonic() < end:
        with mine.holding_if_dead("one") as absent:
            if absent:
                break
        time.sleep(0.05)
    assert absent
    with mine.holding_if_dead("one") as absent:
        assert absent
        with pytest.raises(RequestError):
            WorkerLock(database).acquire(
                "one"
            )  # nobody of this name starts while its jobs are taken over
    mine.acquire("one")
    mine.ensure("one")
    mine.release()
