"""What a service of an earlier version stored is served by this one.

`tests/fixtures/service_data/README.md` says how the data was made, and what is in it.
"""

import json
import sqlite3
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks import Webhook

from service.records.api_keys import ApiKeys
from service.records.database import connect
from service.records.identity import SCOPES
from tests.support.served import Served, served
from tests.support.webhook_receiver import Receiver, receiving

STORED = Path(__file__).parents[1] / "fixtures" / "service_data"
EXPECTED: dict[str, Any] = json.loads((STORED / "expected.json").read_text())
KL_TOLERANCE = 0.02
"""Processors multiply in different ways, so a KL divergence is not the same to the last digit."""


@dataclass(frozen=True)
class Upgraded:
    """A service of today on the data of an earlier one.

    Attributes:
        folder: what was unpacked: `data` and `models`.
        server: API and worker.
        receiver: of the webhook that was registered in the earlier service.
        jobs: all jobs by id, as the service listed them when it had started.
    """

    folder: Path
    server: Served
    receiver: Receiver
    jobs: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def upgraded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upgraded]:
    folder = tmp_path_factory.mktemp("upgraded")
    with tarfile.open(STORED / "service_data.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    variables = {"BITWRIGHT_WEBHOOK_TARGETS": "127.0.0.0/8"}
    with receiving() as receiver:
        with sqlite3.connect(folder / "data" / "bitwright.sqlite") as database:
            database.execute("UPDATE webhooks SET url = ?", (receiver.url,))
        database.close()
        with served(folder, folder / "models", variables=variables) as server:
            listed = server.client.get("/v1/jobs").json()["data"]
            jobs = {job["id"]: job for job in listed}
            yield Upgraded(folder, server, receiver, jobs)


def artifacts_of(server: Served, job_id: str) -> dict[str, str]:
    rows = server.client.get(f"/v1/jobs/{job_id}/artifacts").json()["data"]
    return {row["name"]: row["sha256"] for row in rows}


def assert_same_result(job: dict[str, Any], earlier: dict[str, Any]) -> None:
    """Check that a job has what the earlier version found for the same options."""
    assert job["status"] == "succeeded", job["error"]
    now, then = job["result"], earlier["job"]["result"]
    for name in ("budget_bytes", "plan_bytes", "bits_per_weight", "checkpoint_bytes"):
        assert now[name] == then[name], name
    kl = [each["evaluation"]["plan"]["kl_nats_per_token"] for each in (now, then)]
    assert kl[0] == pytest.approx(kl[1], rel=KL_TOLERANCE)


@pytest.mark.parametrize("name", ["finished", "failed", "killed"])
def test_jobs_that_had_ended_are_listed_as_they_were(upgraded: Upgraded, name: str) -> None:
    earlier = EXPECTED[name]["job"]
    listed = upgraded.jobs[earlier["id"]]
    assert {key: listed[key] for key in earlier if key != "stages"} == {
        key: value for key, value in earlier.items() if key != "stages"
    }


def test_all_jobs_are_there(upgraded: Upgraded) -> None:
    names = ("finished", "failed", "killed", "running", "waiting")
    assert set(upgraded.jobs) == {EXPECTED[name]["id"] for name in names}


def test_their_artifacts_are_downloaded_whole(upgraded: Upgraded) -> None:
    client, finished = upgraded.server.client, EXPECTED["finished"]
    base = f"/v1/jobs/{finished['id']}/artifacts"
    assert artifacts_of(upgraded.server, finished["id"]) == finished["artifacts"]
    for name, digest in finished["artifacts"].items():
        assert sha256(client.get(f"{base}/{name}").content).hexdigest() == digest
    report = client.get(f"{base}/report.json").json()
    assert report["plan_bytes"] == finished["job"]["result"]["plan_bytes"]
    assert client.get(f"/v1/jobs/{finished['id']}/archive").status_code == 200


def test_their_events_and_logs_are_there(upgraded: Upgraded) -> None:
    base = f"/v1/jobs/{EXPECTED['finished']['id']}"
    events = upgraded.server.client.get(f"{base}/events", params={"limit": 500}).json()["data"]
    version = EXPECTED["finished"]["job"]["version"]
    assert [event["seq"] for event in events] == list(range(1, version + 1))
    assert upgraded.server.client.get(f"{base}/logs").status_code == 200


def test_the_profile_answers_what_ifs_with_the_same_numbers(upgraded: Upgraded) -> None:
    client, whatif = upgraded.server.client, EXPECTED["whatif"]
    assert client.get("/v1/profiles").json()["data"] == [whatif["profile"]]
    profile = client.get(f"/v1/profiles/{whatif['profile']}").json()
    assert EXPECTED["profile"].items() <= profile.items()
    body = {"questions": whatif["questions"], "include_plans": True}
    answers = client.post(f"/v1/profiles/{whatif['profile']}/allocations", json=body).json()
    for now, then in zip(answers["data"], whatif["answers"], strict=True):
        if "problem" in then:
            named = ("type", "status", "nearest_bytes", "largest_bytes", "binding")
            assert {key: now["problem"][key] for key in named} == {
                key: then["problem"][key] for key in named
            }
            continue
        assert now["allocation"]["plan"]["layers"] == then["allocation"]["plan"]["layers"]
        for key, value in then["allocation"].items():
            if key == "bound_nats_per_token":  # a bound may become tighter, never looser
                predicted = then["allocation"]["predicted_loss_nats_per_token"]
                assert value - 1e-9 <= now["allocation"][key] <= predicted + 1e-9
            elif key == "gap":
                assert 0 <= now["allocation"][key] <= value + 1e-9
            elif isinstance(value, float):
                assert now["allocation"][key] == pytest.approx(value, rel=1e-6), key
            elif isinstance(value, int):
                assert now["allocation"][key] == value, key


def test_a_job_that_was_running_goes_on(upgraded: Upgraded) -> None:
    done = upgraded.server.wait(EXPECTED["running"]["id"])
    assert_same_result(done, EXPECTED["finished"])
    assert done["profile"] == EXPECTED["whatif"]["profile"]
    starts = {stage["stage"]: stage["starts"] for stage in done["stages"]}
    assert (starts["profile"], starts["plan"], starts["quantize"]) == (1, 1, 2)


def test_a_job_that_waited_runs_with_the_meaning_it_had(upgraded: Upgraded) -> None:
    """Its budget is that of the whole file."""
    done = upgraded.server.wait(EXPECTED["waiting"]["id"])
    assert done["request"]["whole_file"] is True
    assert_same_result(done, EXPECTED["whole_file"])


def test_a_failed_job_that_is_tried_again_goes_on_where_it_failed(upgraded: Upgraded) -> None:
    job_id = EXPECTED["killed"]["id"]
    assert upgraded.server.client.post(f"/v1/jobs/{job_id}/retry").status_code == 202
    done = upgraded.server.wait(job_id)
    assert_same_result(done, EXPECTED["finished"])
    stages = [stage["stage"] for stage in done["stages"] if stage["attempt"] == 2]
    assert stages[0] == "quantize"


def test_a_budget_that_was_infeasible_is_so_again(upgraded: Upgraded) -> None:
    earlier = EXPECTED["failed"]
    answer = upgraded.server.client.post(f"/v1/jobs/{earlier['id']}/retry")
    assert answer.status_code == 202
    failed = upgraded.server.wait(earlier["id"])
    assert failed["attempt"] == 2
    for key in ("type", "status", "budget_bytes", "nearest_bytes", "largest_bytes", "binding"):
        assert failed["error"][key] == earlier["job"]["error"][key], key


def test_a_fork_keeps_the_meaning_of_the_budget(upgraded: Upgraded) -> None:
    """A budget in bytes was that of the layers."""
    base = f"/v1/jobs/{EXPECTED['finished']['id']}/fork"
    same = upgraded.server.client.post(base, json={}).json()
    assert_same_result(upgraded.server.wait(same["id"]), EXPECTED["finished"])
    smaller = upgraded.server.client.post(base, json={"budget": "34kB"}).json()
    plan = finished_stage(upgraded.server, smaller["id"], "plan")
    upgraded.server.client.post(f"/v1/jobs/{smaller['id']}/cancel")
    assert plan["budget_bytes"] == 34_000
    assert 29_952 <= plan["plan_bytes"] <= 34_000


def finished_stage(server: Served, job_id: str, stage: str) -> dict[str, Any]:
    """Wait until a stage of a job has finished, and return what it reported."""
    end = time.monotonic() + 300
    while time.monotonic() < end:
        events = server.client.get(f"/v1/jobs/{job_id}/events", params={"limit": 500}).json()
        for event in events["data"]:
            if event["type"] == "stage.finished" and event["data"]["stage"] == stage:
                return dict(event["data"])
        time.sleep(0.1)
    raise AssertionError(f"stage {stage} of job {job_id} did not finish: {server.log[-5000:]}")


def test_the_webhook_is_still_sent_to_and_signed_with_its_secret(upgraded: Upgraded) -> None:
    done = upgraded.server.wait(EXPECTED["running"]["id"])
    end = time.monotonic() + 60
    while not any(
        message["type"] == "job.succeeded" and message["data"]["job"] == done["id"]
        for message in upgraded.receiver.messages
    ):
        assert time.monotonic() < end, upgraded.receiver.messages
        time.sleep(0.1)
    webhook = Webhook(EXPECTED["webhook"]["secret"])
    for body, headers in upgraded.receiver.received:
        webhook.verify(body, {name.lower(): value for name, value in headers.items()})


def test_an_api_key_is_still_valid(upgraded: Upgraded) -> None:
    engine = connect(f"sqlite:///{upgraded.folder / 'data' / 'bitwright.sqlite'}")
    caller = ApiKeys(engine).caller(EXPECTED["key"]["key"])
    engine.dispose()
    assert (caller.tenant, caller.scopes) == (EXPECTED["key"]["tenant"], frozenset(SCOPES))
