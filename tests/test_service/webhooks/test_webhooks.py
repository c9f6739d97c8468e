"""Promises of service.records.outbox and webhook_store.

Events leave with the change that makes them, signed, in order, again until they arrive.
"""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa
from standardwebhooks import Webhook as Verifier

from service.errors import TargetRefused, WebhookUnknown
from service.records.engine import EngineClient
from service.records.job import Status
from service.records.job_service import JobService
from service.records.job_store import JobStore
from service.records.outbox import DELIVERED, EVENT_TYPES, GIVEN_UP, PENDING, Outbox
from service.records.quota import Quota
from service.records.submission import Submission
from service.records.tables import deliveries
from service.records.webhook_store import WebhookStore
from tests.support.served import Served
from tests.support.webhook_receiver import receiving

HERE = ("127.0.0.0/8",)


@pytest.fixture
def outbox(database: sa.Engine) -> Outbox:
    return Outbox(database, HERE)


@pytest.fixture
def hooks(database: sa.Engine) -> WebhookStore:
    return WebhookStore(database, HERE)


@pytest.fixture
def job_service(database: sa.Engine) -> JobService:
    return JobService(JobStore(database), EngineClient(database).enqueue, Quota())


def run_job(job_service: JobService, store: JobStore, tenant: str = "me") -> str:
    """Take a job through its life and return its id."""
    job, _ = job_service.submit(Submission(tenant, {"model": "m", "budget": "3bpw"}))
    store.start_stage(job.id, 1, "profile", "w")
    store.progress(job.id, 1, {"done": 1, "total": 2})
    store.end_stage(job.id, 1, "profile", {"profile": "f" * 64})
    store.end(job.id, 1, Status.SUCCEEDED, result={})
    return job.id


def all_due(outbox: Outbox) -> None:
    """Send until nothing is due."""
    while outbox.send_due(time.time()):
        pass


def test_events_arrive_signed_in_order_and_only_those_wanted_and_ones_own(
    hooks: WebhookStore, outbox: Outbox, job_service: JobService, database: sa.Engine
) -> None:
    with receiving() as mine, receiving() as theirs:
        webhook = hooks.add("me", mine.url, EVENT_TYPES)
        hooks.add("they", theirs.url, EVENT_TYPES)
        hooks.add("me", theirs.url, ["job.failed"])
        job_id = run_job(job_service, JobStore(database))
        all_due(outbox)
        assert theirs.received == []
        assert [message["type"] for message in mine.messages] == [
            "job.queued",
            "stage.started",
            "stage.finished",
            "job.succeeded",
        ]
        assert [message["data"]["seq"] for message in mine.messages] == [1, 2, 4, 5]
        assert {message["data"]["job"] for message in mine.messages} == {job_id}
        assert mine.messages[2]["data"]["profile"] == "f" * 64
        for body, headers in mine.received:
            Verifier(webhook.secret).verify(
                body, {name.lower(): value for name, value in headers.items()}
            )
            assert headers["content-type"] == "application/json"
        assert len({headers["webhook-id"] for _, headers in mine.received}) == 4


def test_what_fails_is_sent_again_later_and_what_follows_it_waits(
    hooks: WebhookStore,
    outbox: Outbox,
    job_service: JobService,
    database: sa.Engine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "service.records.outbox.delay_before", lambda attempt, _: 0.05 if attempt < 9 else None
    )
    with receiving(lambda number: 500 if number < 2 else 204) as receiver:
        webhook = hooks.add("me", receiver.url, ["job.queued", "job.succeeded"])
        run_job(job_service, JobStore(database))
        for _ in range(40):
            outbox.send_due(time.time())
            time.sleep(0.02)
        assert [message["type"] for message in receiver.messages] == ["job.queued"] * 3 + [
            "job.succeeded"
        ]
        ids = [headers["webhook-id"] for _, headers in receiver.received]
        assert len(set(ids)) == 2
        rows = outbox.newest(webhook, 10)
        assert [(row["type"], row["status"], row["attempts"]) for row in rows] == [
            ("job.succeeded", DELIVERED, 1),
            ("job.queued", DELIVERED, 3),
        ]


def test_a_receiver_that_never_answers_is_given_up_and_stops_nothing_else(
    hooks: WebhookStore,
    outbox: Outbox,
    job_service: JobService,
    database: sa.Engine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "service.records.outbox.delay_before", lambda attempt, _: 0.0 if attempt < 3 else None
    )
    with receiving(lambda _: 503) as broken, receiving() as sound:
        bad = hooks.add("me", broken.url, ["job.succeeded"])
        hooks.add("me", sound.url, ["job.succeeded"])
        run_job(job_service, JobStore(database))
        all_due(outbox)
        assert len(broken.received) == 3
        assert len(sound.received) == 1
        (row,) = outbox.newest(bad, 10)
        assert (row["status"], row["answer"]) == (GIVEN_UP, "503")


def test_a_delivery_that_was_being_sent_when_its_worker_died_is_sent_again(
    hooks: WebhookStore,
    outbox: Outbox,
    job_service: JobService,
    database: sa.Engine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with receiving() as receiver:
        hooks.add("me", receiver.url, ["job.succeeded"])
        run_job(job_service, JobStore(database))

        def die(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(
                "service.records.outbox.failpoint",
                lambda name: die() if name == "webhook-sent" else None,
            )
            with pytest.raises(KeyboardInterrupt):
                outbox.send_due(time.time())
        with database.connect() as connection:
            assert connection.execute(sa.select(deliveries.c.status)).scalar_one() == PENDING
        assert outbox.send_due(time.time()) == 0
        assert outbox.send_due(time.time() + 61) == 1
        first, second = receiver.received
        assert first[0] == second[0]
        assert first[1]["webhook-id"] == second[1]["webhook-id"]


def test_workers_that_send_at_once_send_each_delivery_once(
    hooks: WebhookStore, outbox: Outbox, job_service: JobService, database: sa.Engine
) -> None:
    with receiving() as receiver:
        hooks.add("me", receiver.url, ["job.succeeded"])
        for _ in range(10):
            run_job(job_service, JobStore(database))
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: outbox.send_due(time.time()), range(4)))
        assert len(receiver.received) == 10


def test_a_change_that_is_undone_leaves_no_delivery(
    hooks: WebhookStore, database: sa.Engine
) -> None:
    hooks.add("me", "http://127.0.0.1:8000/x", EVENT_TYPES)

    def refuse(*_: object) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        JobService(JobStore(database), refuse, Quota()).submit(
            Submission("me", {"model": "m", "budget": "3bpw"})
        )
    with database.connect() as connection:
        assert (
            connection.execute(sa.select(sa.func.count()).select_from(deliveries)).scalar_one() == 0
        )


def test_private_targets_need_the_operators_leave_and_webhooks_belong_to_a_tenant(
    database: sa.Engine,
) -> None:
    with pytest.raises(TargetRefused):
        WebhookStore(database).add("me", "http://127.0.0.1:8000/x", ["job.failed"])
    hooks = WebhookStore(database, HERE)
    webhook = hooks.add("me", "http://127.0.0.1:8000/x", ["job.failed"])
    with pytest.raises(WebhookUnknown):
        hooks.remove("they", webhook.id)
    Outbox(database, HERE).add_test(webhook)
    hooks.remove("me", webhook.id)
    assert hooks.all("me") == []


def test_a_worker_sends_what_a_job_does_and_tests(server: Served) -> None:
    with receiving() as receiver:
        made = server.client.post(
            "/v1/webhooks", json={"url": receiver.url, "events": ["job.queued", "job.cancelled"]}
        )
        assert made.status_code == 201, made.text
        webhook = made.json()
        assert server.client.get("/v1/webhooks").json()["data"][0]["secret"] is None
        delivery = server.client.post(f"/v1/webhooks/{webhook['id']}/test").json()["delivery"]
        job = server.submit(budget="4.1bpw")
        server.client.post(f"/v1/jobs/{job['id']}/cancel")
        server.wait(job["id"])
        end = time.monotonic() + 20
        while len(receiver.received) < 3 and time.monotonic() < end:
            time.sleep(0.1)
        kinds = [message["type"] for message in receiver.messages]
        assert sorted(kinds) == [
            "job.cancelled",
            "job.queued",
            "test",
        ]  # deliveries of different events may overtake each other
        body, headers = receiver.received[kinds.index("test")]
        assert headers["webhook-id"] == delivery
        Verifier(webhook["secret"]).verify(
            body, {name.lower(): value for name, value in headers.items()}
        )
        listed = server.client.get(f"/v1/webhooks/{webhook['id']}/deliveries").json()["data"]
        assert {row["status"] for row in listed} <= {"delivered", "pending"}
        assert server.client.delete(f"/v1/webhooks/{webhook['id']}").status_code == 204
        assert webhook["secret"] not in server.log
