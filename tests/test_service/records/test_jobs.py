"""Jobs over HTTP, run by a real server: cancelled, retried, killed, stopped, counted."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import httpx2
import psutil
import pytest

from service.process import stage_environment
from service.stage_process.command import NICE
from tests.support.s3 import S3
from tests.support.s3 import variables as aws
from tests.support.served import SMALL_JOB, Served, command_line, kill, served


def test_cancelling_frees_the_machine_within_ten_seconds_and_a_retry_goes_on(
    server: Served,
) -> None:
    job = server.submit(calibration_windows=64, budget="3.3bpw", seed=5)
    running = server.wait(job["id"], statuses=("running",))
    while not server.stages():
        time.sleep(0.05)
    assert running["stage"] == "profile"
    start = time.monotonic()
    answer = server.client.post(f"/v1/jobs/{job['id']}/cancel")
    assert answer.status_code == 202
    assert answer.json()["status"] == "cancelling"
    assert server.client.post(f"/v1/jobs/{job['id']}/cancel").status_code == 202
    assert server.wait(job["id"])["status"] == "cancelled"
    assert not server.stages()
    assert time.monotonic() - start < 10
    again = server.client.post(f"/v1/jobs/{job['id']}/retry")
    assert (again.status_code, again.json()["attempt"]) == (202, 2)
    finished = server.wait(job["id"])
    assert finished["status"] == "succeeded", finished
    late = server.client.post(f"/v1/jobs/{job['id']}/cancel")
    assert (late.status_code, late.json()["type"]) == (409, "urn:bitwright:problem:job-ended")


def test_a_stage_that_fails_ends_the_job_with_the_reason_and_a_log(
    server: Served, models: Path
) -> None:
    (models / "broken").mkdir(exist_ok=True)
    (models / "broken" / "config.json").write_text('{"model_type": "llama"}')
    job = server.submit(model="broken")
    failed = server.wait(job["id"])
    assert failed["status"] == "failed"
    assert failed["error"]["type"] == "urn:bitwright:problem:model-error"
    assert "no weights" in failed["error"]["detail"]
    assert str(models) not in failed["error"]["detail"]
    infeasible = server.wait(server.submit(budget="0.5bpw")["id"])
    assert infeasible["error"]["type"] == "urn:bitwright:problem:budget-infeasible"
    assert infeasible["error"]["nearest_bytes"] > 0
    log = server.client.get(f"/v1/jobs/{job['id']}/logs")
    assert log.status_code == 200
    assert int(log.headers["x-last-line"]) >= 0


def test_a_stage_that_is_killed_ends_the_job_and_the_service_lives(server: Served) -> None:
    job = server.submit(calibration_windows=64, budget="3.2bpw", seed=6)
    while not server.stages():
        time.sleep(0.02)
    kill(server.stages()[0].pid)
    failed = server.wait(job["id"])
    assert failed["error"]["type"] == "urn:bitwright:problem:stage-killed"
    assert "memory" in failed["error"]["detail"]
    assert server.client.get("/readyz").status_code == 200
    assert server.client.delete(f"/v1/jobs/{job['id']}").status_code == 204
    assert server.client.get(f"/v1/jobs/{job['id']}").status_code == 404
    assert server.client.get(f"/v1/jobs/{job['id']}/events").status_code == 404


def first_stage(server: Served, job_id: str) -> psutil.Process:
    """Wait for the process of a job's first stage; the server may still end those of other jobs."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for process in server.stages():
            if {"profile", job_id} <= set(command_line(process)):
                return process
        time.sleep(0.02)
    raise AssertionError(f"job {job_id} does not start: {server.log[-5000:]}")


def test_a_stage_gets_an_allow_list_of_variables_and_gives_way(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITWRIGHT_DATABASE_URL", "postgresql://me:hunter2@host/x")
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    monkeypatch.setenv("AWS_REGION", "here")
    found = stage_environment()
    assert "hunter2" not in str(found)
    assert found["AWS_REGION"] == "here"
    job = server.submit(calibration_windows=64, budget="3.1bpw", seed=7)
    stage = first_stage(server, job["id"])
    polite = min(psutil.Process().nice() + NICE, 19)
    end = time.monotonic() + 20
    while stage.nice() != polite and time.monotonic() < end:
        time.sleep(0.05)
    assert stage.nice() == polite
    assert os.getpgid(stage.pid) == stage.pid
    server.client.post(f"/v1/jobs/{job['id']}/cancel")
    server.wait(job["id"])


def test_a_graceful_stop_says_goodbye_ends_the_stage_and_the_job_goes_on_after(
    models: Path, tmp_path: Path
) -> None:
    own = Served(tmp_path, models)
    try:
        while not own.workers() or "worker begins" not in own.log:
            time.sleep(0.02)
        kill(
            own.workers()[0].pid
        )  # one that was started again is to end as gracefully as the first
        job = own.submit(calibration_windows=16, budget="3bpw", seed=8)
        while not own.stages():
            time.sleep(0.02)
        stage = own.stages()[0]
        with own.client.stream(
            "GET", f"/v1/jobs/{job['id']}/events", headers={"Accept": "text/event-stream"}
        ) as stream:
            lines = stream.iter_lines()
            next(lines)
            start = time.monotonic()
            own.process.send_signal(signal.SIGTERM)
            assert "event: bye" in list(lines)
        assert own.stop() == 0
        assert time.monotonic() - start < 20
        assert not stage.is_running()
        assert "worker ends" in own.log
        own.start()
        assert own.wait(job["id"])["status"] == "succeeded"
    finally:
        own.stop(signal.SIGKILL)


def test_jobs_of_a_higher_priority_go_first(server: Served) -> None:
    first = server.submit(calibration_windows=64, budget="3bpw", seed=9)
    server.wait(first["id"], statuses=("running",))
    waiting = {
        priority: server.submit(priority=priority, budget="4bpw")["id"]
        for priority in ("low", "normal", "high")
    }
    server.client.post(f"/v1/jobs/{first['id']}/cancel")
    ended = [server.wait(job_id) for job_id in waiting.values()]
    begun = sorted(ended, key=lambda job: str(job["started_at"]))
    assert [job["priority"] for job in begun] == ["high", "normal", "low"]


def test_results_and_profiles_can_lie_in_an_s3_store(models: Path, tmp_path: Path, s3: S3) -> None:
    bucket = s3.fresh()
    variables = {**aws(s3.url), "BITWRIGHT_ARTIFACTS": f"{bucket}/deep/er"}
    with served(tmp_path, models, variables=variables) as server:
        job = server.wait(server.submit()["id"])
        assert job["status"] == "succeeded", job
        row = next(
            row
            for row in server.client.get(f"/v1/jobs/{job['id']}/artifacts").json()["data"]
            if row["name"] == "model.safetensors"
        )
        assert sha256(server.client.get(row["url"]).content).hexdigest() == row["sha256"]
        asked = {"questions": [{"budget": "4bpw"}]}
        assert (
            server.client.post(f"/v1/profiles/{job['profile']}/allocations", json=asked).status_code
            == 200
        )
        assert not (tmp_path / "data" / "artifacts").exists()
        assert server.client.delete(f"/v1/jobs/{job['id']}").status_code == 204


def test_two_hundred_submissions_with_one_key_make_one_job(server: Served) -> None:
    body = {**SMALL_JOB, "model": "llama", "budget": "4bpw", "name": "once"}

    def submit(_: int) -> httpx2.Response:
        return server.client.post("/v1/jobs", json=body, headers={"Idempotency-Key": "two hundred"})

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(submit, range(200)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    named = [
        job
        for job in server.client.get("/v1/jobs", params={"limit": 100}).json()["data"]
        if job["name"] == "once"
    ]
    assert len(named) == 1
    other = server.client.post(
        "/v1/jobs", json=body | {"budget": "3bpw"}, headers={"Idempotency-Key": "two hundred"}
    )
    assert (other.status_code, other.json()["type"]) == (422, "urn:bitwright:problem:key-reused")
    server.client.post(f"/v1/jobs/{named[0]['id']}/cancel")
