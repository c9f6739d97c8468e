"""Promises of jobs on record.

Statuses only move as documented, keys make one job, quotas hold, pages are whole.
"""

import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from service.errors import JobActive, JobEnded, JobUnknown, KeyReused, QuotaExceeded
from service.records.database import connect
from service.records.engine import EngineClient, workflow_id
from service.records.job import Job, Status
from service.records.job_service import JobService
from service.records.job_store import JobStore
from service.records.quota import Quota, set_quota
from service.records.submission import Submission

ME, OTHER = "me", "another"


@pytest.fixture
def store(database: sa.Engine) -> JobStore:
    return JobStore(database)


@pytest.fixture
def job_service(store: JobStore) -> JobService:
    return JobService(store, EngineClient(store.engine).enqueue, Quota())


def ask(budget: str = "3bpw", **more: Any) -> Submission:
    return Submission(ME, {"model": "m", "budget": budget}, **more)


def test_a_job_is_on_record_with_its_event_and_its_workflow_or_not_at_all(
    store: JobStore, job_service: JobService
) -> None:
    job, new = job_service.submit(ask(name="first"))
    assert new
    assert store.get(job.id) == job
    assert (job.status, job.version, job.attempt) == (Status.QUEUED, 1, 1)
    assert [(event.seq, event.type) for event in store.events(job.id, 0, 10)] == [(1, "job.queued")]
    assert workflow_id(job.id, 1) in EngineClient(store.engine).workflows([workflow_id(job.id, 1)])

    def refuse(*_: Any) -> None:
        raise RuntimeError("the engine is broken")

    with pytest.raises(RuntimeError):
        JobService(store, refuse, Quota()).submit(ask())
    assert [
        row.id for row in job_service.page(ME, status=None, label=None, after=None, limit=10).rows
    ] == [job.id]


def test_one_key_makes_one_job_however_many_submit_at_once(
    store: JobStore, job_service: JobService
) -> None:
    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(lambda _: job_service.submit(ask(key="once")), range(60)))
    assert len({job.id for job, _ in found}) == 1
    assert sum(new for _, new in found) == 1
    assert len(job_service.page(ME, status=None, label=None, after=None, limit=10).rows) == 1
    with pytest.raises(KeyReused, match="another body"):
        job_service.submit(ask("4bpw", key="once"))
    theirs, new = job_service.submit(
        Submission(OTHER, {"model": "m", "budget": "3bpw"}, key="once")
    )
    assert new
    assert theirs.id != found[0][0].id
    assert store.get(theirs.id).tenant == OTHER


def test_other_tenants_jobs_are_as_if_they_were_not_there(
    store: JobStore, job_service: JobService
) -> None:
    job, _ = job_service.submit(ask())
    for forbidden in (
        lambda: store.get(job.id, OTHER),
        lambda: job_service.cancel(OTHER, job.id),
        lambda: job_service.retry(OTHER, job.id),
    ):
        with pytest.raises(JobUnknown):
            forbidden()
    assert job_service.page(OTHER, status=None, label=None, after=None, limit=10).rows == []


def test_a_job_goes_from_stage_to_stage_and_ends_once(
    store: JobStore, job_service: JobService
) -> None:
    job, _ = job_service.submit(ask())
    begun = store.start_stage(job.id, 1, "profile", "w")
    assert begun is not None
    assert (begun.status, begun.stage, begun.worker) == (Status.RUNNING, "profile", "w")
    store.progress(job.id, 1, {"done": 1, "total": 2})
    assert store.get(job.id).progress == {"done": 1, "total": 2}
    store.end_stage(job.id, 1, "profile", {"profile": "f" * 64})
    assert store.get(job.id).profile == "f" * 64
    ended = store.end(job.id, 1, Status.SUCCEEDED, result={"bits": 3}, stored_bytes=7)
    assert ended is not None
    assert ended.status.ended
    assert store.end(job.id, 1, Status.FAILED, error={"type": "late"}) is None
    assert store.start_stage(job.id, 1, "plan", "w") is None
    assert store.get(job.id) == ended
    types = [event.type for event in store.events(job.id, 0, 10)]
    assert types == [
        "job.queued",
        "stage.started",
        "stage.progress",
        "stage.finished",
        "job.succeeded",
    ]
    assert [event.seq for event in store.events(job.id, 2, 2)] == [3, 4]
    (stage,) = store.stages(job.id)
    assert (stage["stage"], stage["starts"], stage["finished_at"] >= stage["started_at"]) == (
        "profile",
        1,
        True,
    )


def test_a_stage_that_starts_again_is_counted_and_keeps_its_first_time(
    store: JobStore, job_service: JobService
) -> None:
    job, _ = job_service.submit(ask())
    store.start_stage(job.id, 1, "profile", "w0")
    (first,) = store.stages(job.id)
    store.start_stage(job.id, 1, "profile", "w1")
    (again,) = store.stages(job.id)
    assert (again["starts"], again["worker"], again["started_at"]) == (2, "w1", first["started_at"])


def test_a_queued_job_is_cancelled_at_once_and_a_running_one_when_its_stage_stopped(
    store: JobStore, job_service: JobService
) -> None:
    waiting, _ = job_service.submit(ask())
    assert job_service.cancel(ME, waiting.id).status is Status.CANCELLED
    assert store.start_stage(waiting.id, 1, "profile", "w") is None
    running, _ = job_service.submit(ask())
    store.start_stage(running.id, 1, "profile", "w")
    assert not store.must_stop(running.id, 1)
    assert job_service.cancel(ME, running.id).status is Status.CANCELLING
    assert job_service.cancel(ME, running.id).status is Status.CANCELLING
    assert store.must_stop(running.id, 1)
    ended = store.end(running.id, 1, Status.FAILED, error={"type": "killed"})
    assert ended is not None
    assert (ended.status, ended.error) == (Status.CANCELLED, None)
    done, _ = job_service.submit(ask())
    store.start_stage(done.id, 1, "profile", "w")
    store.end(done.id, 1, Status.SUCCEEDED, result={})
    with pytest.raises(JobEnded, match="succeeded"):
        job_service.cancel(ME, done.id)


def test_a_retry_is_another_attempt_and_what_the_first_one_left_running_cannot_touch_it(
    store: JobStore, job_service: JobService
) -> None:
    job, _ = job_service.submit(ask())
    with pytest.raises(JobActive):
        job_service.retry(ME, job.id)
    store.start_stage(job.id, 1, "quantize", "w")
    store.end(job.id, 1, Status.FAILED, error={"type": "x"})
    again = job_service.retry(ME, job.id)
    assert (again.status, again.attempt, again.error) == (Status.QUEUED, 2, None)
    assert store.start_stage(job.id, 1, "quantize", "zombie") is None
    assert store.end(job.id, 1, Status.FAILED, error={}) is None
    assert store.must_stop(job.id, 1)
    assert workflow_id(job.id, 2) in EngineClient(store.engine).workflows([workflow_id(job.id, 2)])


def test_a_tenant_has_no_more_jobs_and_bytes_than_its_quota(store: JobStore) -> None:
    job_service = JobService(
        store, EngineClient(store.engine).enqueue, Quota(active_jobs=2, stored_bytes=100)
    )
    first, _ = job_service.submit(ask())
    job_service.submit(ask())
    with pytest.raises(QuotaExceeded, match="2 jobs"):
        job_service.submit(ask())
    set_quota(store.engine, ME, Quota(active_jobs=3))
    job_service.submit(ask())
    with pytest.raises(QuotaExceeded, match="3 jobs"):
        job_service.submit(ask())
    job_service.submit(Submission(OTHER, {"model": "m", "budget": "3bpw"}))
    store.start_stage(first.id, 1, "profile", "w")
    store.end(first.id, 1, Status.SUCCEEDED, result={}, stored_bytes=100)
    with pytest.raises(QuotaExceeded, match="100 bytes"):
        job_service.submit(ask())


def test_pages_hold_every_job_once_while_new_ones_come(job_service: JobService) -> None:
    made = [job_service.submit(ask(labels={"n": str(number % 3)}))[0].id for number in range(25)]
    seen: list[str] = []
    after = None
    while True:
        page = job_service.page(ME, status="queued", label=None, after=after, limit=7)
        seen += [job.id for job in page.rows]
        job_service.submit(ask())
        if not page.has_more:
            break
        after = page.rows[-1].id
    assert seen == made[::-1]
    third = job_service.page(ME, status=None, label=("n", "1"), after=None, limit=100).rows
    assert [job.id for job in third] == [
        job_id for number, job_id in enumerate(made) if number % 3 == 1
    ][::-1]


def test_a_log_is_kept_in_order_and_up_to_a_length(
    store: JobStore, job_service: JobService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.records.job_store.MAX_LOG_LINES", 5)
    job, _ = job_service.submit(ask())
    store.write_log(job.id, "profile", ["one", "two", "three"])
    store.write_log(job.id, "profile", ["four", "five", "six"])
    store.write_log(job.id, "profile", ["seven"])
    rows = store.log(job.id, 0, 100)
    assert [text for *_, text in rows] == ["one", "two", "three", "four", "five"]
    assert [text for *_, text in store.log(job.id, rows[2][0], 100)] == ["four", "five"]
    assert store.last_line(job.id) == rows[-1][0]


ALLOWED = {
    Status.QUEUED: {Status.RUNNING, Status.CANCELLED, Status.FAILED},
    Status.RUNNING: {Status.CANCELLING, Status.SUCCEEDED, Status.FAILED, Status.CANCELLED},
    Status.CANCELLING: {Status.CANCELLED, Status.SUCCEEDED},
    Status.SUCCEEDED: set(),
    Status.FAILED: {Status.QUEUED},
    Status.CANCELLED: {Status.QUEUED},
}


class Lives(RuleBasedStateMachine):
    """Everything that clients, workers and zombies may do, in any order.

    Statuses move as documented, versions count events.

    Attributes:
        with_tables: a database that each life begins with a copy of.
    """

    with_tables: Path

    @initialize()
    def submit(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        shutil.copy(self.with_tables, f"{self.folder.name}/lives.sqlite")
        self.engine = connect(f"sqlite:///{self.folder.name}/lives.sqlite")
        self.store = JobStore(self.engine)
        self.job_service = JobService(self.store, EngineClient(self.engine).enqueue, Quota())
        self.job: Job = self.job_service.submit(ask())[0]

    def teardown(self) -> None:
        self.engine.dispose()
        self.folder.cleanup()

    @rule(attempt_back=st.integers(0, 1), stage=st.sampled_from(["profile", "plan"]))
    def begin(self, attempt_back: int, stage: str) -> None:
        self.store.start_stage(self.job.id, self.job.attempt - attempt_back, stage, "w")

    @rule(
        attempt_back=st.integers(0, 1),
        status=st.sampled_from([Status.SUCCEEDED, Status.FAILED, Status.CANCELLED]),
    )
    def end(self, attempt_back: int, status: Status) -> None:
        self.store.end(
            self.job.id,
            self.job.attempt - attempt_back,
            status,
            error={"type": "x"} if status is Status.FAILED else None,
        )

    @rule()
    def cancel(self) -> None:
        try:
            self.job_service.cancel(ME, self.job.id)
        except JobEnded:
            assert self.job.status in (Status.SUCCEEDED, Status.FAILED)

    @rule()
    def retry(self) -> None:
        try:
            self.job_service.retry(ME, self.job.id)
        except JobActive:
            assert self.job.status not in (Status.FAILED, Status.CANCELLED)

    @rule()
    def progress(self) -> None:
        self.store.progress(self.job.id, self.job.attempt, {"done": 1})

    @invariant()
    def moved_as_documented(self) -> None:
        now = self.store.get(self.job.id)
        assert now.status is self.job.status or now.status in ALLOWED[self.job.status]
        assert now.attempt - self.job.attempt == (
            now.status is Status.QUEUED and self.job.status is not Status.QUEUED
        )
        assert [event.seq for event in self.store.events(now.id, 0, 1000)] == list(
            range(1, now.version + 1)
        )
        assert (now.finished_at is not None) == now.status.ended
        self.job = now


def test_lives_of_jobs_are_as_documented(sqlite_with_tables: Path) -> None:
    class Copied(Lives):
        with_tables = sqlite_with_tables

    run_state_machine_as_test(
        Copied,
        settings=settings(
            max_examples=25,
            stateful_step_count=20,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
