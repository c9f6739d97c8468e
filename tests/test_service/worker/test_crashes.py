"""Nothing is lost or half-written whatever is killed.

`python -m tests.benchmarks.kills` does the same with more jobs and kills.
"""

import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx2
import pytest

from service.request.stage_names import STAGES
from tests.support.commands import bitwright_json, run_options
from tests.support.crashes import calm_results, nothing_half_written, results_of, soak
from tests.support.postgres import Postgres
from tests.support.served import SMALL_JOB, Served, served
from tests.support.webhook_receiver import receiving

POINTS = (
    "job-uncommitted",
    "job-committed",
    *(f"{stage}-{where}" for stage in STAGES for where in ("started", "done", "unrecorded")),
    "artifact-begun",
    "artifact-written",
    "artifact-listed",
    "end-unrecorded",
    "webhook-before",
    "webhook-sent",
)


def variables_for(kind: str, request: pytest.FixtureRequest, folder: Path) -> dict[str, str]:
    """Return the variables that make a server use a database of a kind."""
    if kind == "sqlite":
        return {}
    postgres: Postgres = request.getfixturevalue("postgres")
    return {
        "BITWRIGHT_DATABASE_URL": postgres.fresh(f"crash_{abs(hash(str(folder))):x}"),
        "BITWRIGHT_WORKER": "one",
    }


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_jobs_survive_random_kills_of_workers_servers_and_the_database(
    kind: str, tmp_path: Path, models: Path, request: pytest.FixtureRequest
) -> None:
    postgres = request.getfixturevalue("postgres") if kind == "postgresql" else None
    expected = calm_results(tmp_path / "calm", models, 4)
    found = soak(tmp_path / "wild", models, expected, kills=4, postgres=postgres, seed=3)
    assert found.kills.total() >= 4
    assert found.twice_at_once == 0


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_job_survives_a_kill_at_every_point(
    kind: str, tmp_path: Path, models: Path, request: pytest.FixtureRequest
) -> None:
    markers = tmp_path / "markers"
    markers.mkdir()
    with served(tmp_path / "calm", models) as calm:
        expected = results_of(calm, calm.wait(calm.submit()["id"]))
    points = ",".join(f"{point}:{markers / point}" for point in POINTS)
    variables = {
        **variables_for(kind, request, tmp_path),
        "BITWRIGHT_WEBHOOK_TARGETS": "127.0.0.0/8",
    }
    with receiving() as receiver, served(tmp_path / "wild", models, variables=variables) as server:
        hook = {"url": receiver.url, "events": ["job.queued", "job.succeeded"]}
        assert server.client.post("/v1/webhooks", json=hook).status_code == 201
        server.stop()
        server.start({"BITWRIGHT_FAILPOINT": points})
        job = submit_stubbornly(server, {"BITWRIGHT_FAILPOINT": points})
        end = time.monotonic() + 600
        while (
            job["status"] != "succeeded" or len(receiver.messages) < 3
        ) and time.monotonic() < end:
            if (
                job["status"] == "failed"
            ):  # the stage alone was killed: whoever sent the job tries again
                assert job["error"]["type"] == "urn:bitwright:problem:stage-killed", job["error"]
                assert server.client.post(f"/v1/jobs/{job['id']}/retry").status_code == 202
            time.sleep(0.2)
            job = server.client.get(f"/v1/jobs/{job['id']}").json()
        assert sorted(path.name for path in markers.iterdir()) == sorted(POINTS)
        assert results_of(server, job) == expected
        assert len(server.client.get("/v1/jobs").json()["data"]) == 1
        nothing_half_written(tmp_path / "wild" / "data" / "artifacts")
        while receiver.messages[-1]["type"] != "job.succeeded" and time.monotonic() < end:
            time.sleep(0.2)
        received = [(message["type"], message["data"]["seq"]) for message in receiver.messages]
        assert received[-1] == ("job.succeeded", job["version"])
        assert [seq for _, seq in received] == sorted(seq for _, seq in received)


@pytest.mark.timeout(900)
def test_a_job_survives_a_kill_of_server_worker_and_stage(tmp_path: Path, models: Path) -> None:
    """One point of each process; `make test-long` has them all, and random ones."""
    out = tmp_path / "out"
    bitwright_json(*run_options(models / "llama", tmp_path / "cache", out))
    chosen = ("job-committed", "quantize-unrecorded", "evaluate-done")
    points = ",".join(f"{point}:{tmp_path / point}" for point in chosen)
    with served(tmp_path / "wild", models, variables={"BITWRIGHT_FAILPOINT": points}) as server:
        job = server.wait(submit_stubbornly(server, {})["id"])
        assert job["error"]["type"] == "urn:bitwright:problem:stage-killed", job
        assert server.client.post(f"/v1/jobs/{job['id']}/retry").status_code == 202
        job = server.wait(job["id"])
        assert job["status"] == "succeeded", job
        assert all((tmp_path / point).exists() for point in chosen)
        found = results_of(server, job)
        assert (
            found["model.safetensors"]
            == sha256((out / "model.safetensors").read_bytes()).hexdigest()
        )
        assert len(server.client.get("/v1/jobs").json()["data"]) == 1
        nothing_half_written(tmp_path / "wild" / "data" / "artifacts")


def submit_stubbornly(server: Served, variables: dict[str, str]) -> dict[str, Any]:
    """Submit one job as a client does that gets no answer.

    Again, under the same key, once the server is back.
    """
    body = {**SMALL_JOB, "model": "llama", "budget": "4bpw"}
    while True:
        try:
            return dict(
                server.client.post(
                    "/v1/jobs", json=body, headers={"Idempotency-Key": "the one"}
                ).json()
            )
        except httpx2.HTTPError:
            server.process.wait(10)
            server.start(variables)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_another_worker_takes_over_from_one_that_is_gone(
    tmp_path: Path, models: Path, postgres: Postgres
) -> None:
    shared = {
        "BITWRIGHT_DATABASE_URL": postgres.fresh("takeover"),
        "BITWRIGHT_ARTIFACTS": str(tmp_path / "shared"),
    }
    with served(tmp_path / "a", models, variables={**shared, "BITWRIGHT_WORKER": "a"}) as first:
        job = first.submit(calibration_windows=64)
        while not first.stages():
            time.sleep(0.02)
        first.stop(signal.SIGKILL)
    with served(tmp_path / "b", models, variables={**shared, "BITWRIGHT_WORKER": "b"}) as second:
        done = second.wait(job["id"])
        assert done["status"] == "succeeded"
        assert {stage["worker"] for stage in done["stages"]} == {"b"}
        assert done["stages"][0]["starts"] == 2


def test_two_workers_of_one_name_do_not_run_at_once(server: Served) -> None:
    refuse_second_worker(server, {**server.variables, "BITWRIGHT_WORKER": "local"})


@pytest.mark.long
def test_two_workers_of_one_name_do_not_run_at_once_on_postgresql(
    tmp_path: Path, models: Path, postgres: Postgres
) -> None:
    variables = {"BITWRIGHT_DATABASE_URL": postgres.fresh("names")}
    with served(tmp_path, models, variables=variables) as server:
        refuse_second_worker(server, server.variables)


def refuse_second_worker(server: Served, variables: dict[str, str]) -> None:
    """Start a second worker once the first runs, and check that it is refused."""
    while "worker begins" not in server.log:
        time.sleep(0.05)
    command = [sys.executable, "-m", "service.cli.main", "worker"]
    second = subprocess.run(
        command, env=variables, capture_output=True, text=True, timeout=60, check=False
    )
    assert second.returncode == 2
    assert "runs already" in second.stderr
