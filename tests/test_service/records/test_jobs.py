"""A job over HTTP, done by a real server and worker.

Watched, cancelled, retried, forked, downloaded, loaded.
"""

import io
import json
import os
import signal
import tarfile
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx2
import pytest
from transformers import AutoModelForCausalLM

import quantizer  # noqa: F401  teaches transformers the format
from service.request.stage_names import STAGES
from tests.support.commands import bitwright_json
from tests.support.s3 import S3
from tests.support.s3 import variables as aws
from tests.support.served import SMALL_JOB, Served, command_line, kill, served


@pytest.fixture(scope="module")
def done(server: Served) -> dict[str, Any]:
    """A job that has succeeded."""
    job = server.submit(name="the first", labels={"team": "kernels"})
    finished = server.wait(job["id"])
    assert finished["status"] == "succeeded", finished
    return finished


def events_of(server: Served, job_id: str, **headers: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Return what a stream of events brings until it ends: (id, event, data)."""
    found = []
    with server.client.stream(
        "GET", f"/v1/jobs/{job_id}/events", headers={"Accept": "text/event-stream", **headers}
    ) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        block: dict[str, str] = {}
        for line in stream.iter_lines():
            if line:
                name, _, value = line.partition(": ")
                block[name] = value
            elif "data" in block:
                found.append((block["id"], block["event"], json.loads(block["data"])))
                block = {}
            else:
                block = {}
    return found


def test_a_job_says_what_was_asked_what_was_found_and_how_long_it_took(
    done: dict[str, Any],
) -> None:
    assert done["request"]["model"] == "llama"
    assert done["labels"] == {"team": "kernels"}
    assert [stage["stage"] for stage in done["stages"]] == list(STAGES)
    assert all(stage["finished_at"] >= stage["started_at"] for stage in done["stages"])
    result = done["result"]
    assert result["plan_bytes"] <= result["budget_bytes"]
    assert result["bits_per_weight"] <= 4
    assert result["evaluation"]["plan"]["kl_nats_per_token"] > 0
    assert done["created_at"] <= done["started_at"] <= done["finished_at"]


def test_a_job_that_has_ended_keeps_nothing_in_the_cache(
    server: Served, done: dict[str, Any]
) -> None:
    assert (server.data / "cache" / "profile").is_dir()
    assert not (server.data / "cache" / "runs" / f"{done['id']}.stages").exists()


def test_its_result_is_the_command_lines(
    server: Served, done: dict[str, Any], models: Path, tmp_path: Path
) -> None:
    options = [
        part
        for name, value in SMALL_JOB.items()
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    report = bitwright_json(
        "run",
        models / "llama",
        "--budget",
        "4bpw",
        "--out",
        tmp_path / "out",
        "--cache",
        tmp_path / "c",
        *options,
    )
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert (
        server.client.get(f"/v1/jobs/{done['id']}/artifacts/model.safetensors").content == weights
    )
    assert done["result"]["evaluation"] == report["evaluation"]


def test_nothing_that_it_made_names_a_path_of_the_server(
    server: Served, done: dict[str, Any], models: Path
) -> None:
    for artifact in server.client.get(f"/v1/jobs/{done['id']}/artifacts").json()["data"]:
        assert str(models).encode() not in server.client.get(artifact["url"]).content, artifact[
            "name"
        ]
    assert str(models) not in json.dumps(done)


def test_artifacts_are_checked_ranged_and_resumable(server: Served, done: dict[str, Any]) -> None:
    rows = server.client.get(f"/v1/jobs/{done['id']}/artifacts").json()["data"]
    assert {"model.safetensors", "plan.json", "report.json", "report.html", "layers.csv"} <= {
        row["name"] for row in rows
    }
    for row in rows:
        whole = server.client.get(row["url"])
        assert sha256(whole.content).hexdigest() == row["sha256"]
        assert len(whole.content) == row["size_bytes"] == int(whole.headers["content-length"])
        assert whole.headers["etag"] == f'"{row["sha256"]}"'
    (row,) = [row for row in rows if row["name"] == "model.safetensors"]
    whole = server.client.get(row["url"]).content
    for asked, expected in (
        ("bytes=0-9", whole[:10]),
        ("bytes=100-", whole[100:]),
        ("bytes=-7", whole[-7:]),
    ):
        part = server.client.get(row["url"], headers={"Range": asked})
        assert (part.status_code, part.content) == (206, expected)
    rest = server.client.get(
        row["url"], headers={"Range": "bytes=10-", "If-Range": f'"{row["sha256"]}"'}
    )
    assert whole[:10] + rest.content == whole
    changed = server.client.get(row["url"], headers={"Range": "bytes=10-", "If-Range": '"another"'})
    assert (changed.status_code, changed.content) == (200, whole)
    assert (
        server.client.get(row["url"], headers={"Range": f"bytes={len(whole)}-"}).status_code == 416
    )
    assert (
        server.client.get(row["url"], headers={"If-None-Match": f'"{row["sha256"]}"'}).status_code
        == 304
    )


def test_the_archive_is_a_checkpoint_that_loads(
    server: Served, done: dict[str, Any], tmp_path: Path
) -> None:
    answer = server.client.get(f"/v1/jobs/{done['id']}/archive")
    assert len(answer.content) == int(answer.headers["content-length"])
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        archive.extractall(tmp_path, filter="data")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / done["id"])
    assert model.config.quantization_config.quant_method == "bitwright"


def test_events_come_as_pages_and_as_a_stream_that_goes_on_where_it_broke(
    server: Served, done: dict[str, Any]
) -> None:
    page = server.client.get(f"/v1/jobs/{done['id']}/events", params={"limit": 5}).json()
    rest = server.client.get(
        f"/v1/jobs/{done['id']}/events", params={"after": page["last_seq"], "limit": 500}
    ).json()
    listed = page["data"] + rest["data"]
    assert page["has_more"]
    assert not rest["has_more"]
    assert [event["seq"] for event in listed] == list(range(1, done["version"] + 1))
    streamed = events_of(server, done["id"])
    assert [(int(number), name) for number, name, _ in streamed] == [
        (event["seq"], event["type"]) for event in listed
    ]
    assert events_of(server, done["id"], **{"Last-Event-ID": "3"}) == streamed[3:]
    assert streamed[0][1] == "job.queued"
    assert streamed[-1][1] == "job.succeeded"
    progress = [data["data"] for _, name, data in streamed if name == "stage.progress"]
    assert all(
        0 <= each["done"] <= each["total"] and each["seconds_left"] >= 0 for each in progress
    )
    assert {"profile", "quantize"} <= {each["stage"] for each in progress}


def test_polling_is_cheap_and_waiting_ends_with_the_change(
    server: Served, done: dict[str, Any]
) -> None:
    first = server.client.get(f"/v1/jobs/{done['id']}")
    again = server.client.get(
        f"/v1/jobs/{done['id']}", headers={"If-None-Match": first.headers["etag"]}
    )
    assert (again.status_code, again.content) == (304, b"")
    assert "retry-after" not in first.headers
    job = server.submit(budget="3.7bpw")
    seen = server.client.get(f"/v1/jobs/{job['id']}")
    assert seen.headers["retry-after"]
    start = time.monotonic()
    changed = server.client.get(
        f"/v1/jobs/{job['id']}",
        params={"wait": 30},
        headers={"If-None-Match": seen.headers["etag"]},
    )
    assert changed.json()["version"] > seen.json()["version"]
    assert time.monotonic() - start < 30
    server.client.post(f"/v1/jobs/{job['id']}/cancel")
    server.wait(job["id"])


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


def test_a_fork_uses_the_profile_and_begins_with_the_plan(
    server: Served, done: dict[str, Any]
) -> None:
    answer = server.client.post(
        f"/v1/jobs/{done['id']}/fork", json={"budget": "3.5bpw", "name": "smaller"}
    )
    assert answer.status_code == 202, answer.text
    fork = server.wait(answer.json()["id"])
    assert fork["status"] == "succeeded", fork
    assert (fork["parent"], fork["profile"], fork["name"]) == (
        done["id"],
        done["profile"],
        "smaller",
    )
    assert [stage["stage"] for stage in fork["stages"]] == list(STAGES[1:])
    assert fork["result"]["bits_per_weight"] <= 3.5
    for field in ("model", "calibration", "seed", "tokens"):
        assert fork["request"][field] == done["request"][field]


def test_a_profile_that_a_job_measured_answers_what_ifs(
    server: Served, done: dict[str, Any]
) -> None:
    assert done["profile"] in server.client.get("/v1/profiles").json()["data"]
    asked = {"questions": [{"budget": "4bpw"}, {"budget": "3bpw"}]}
    answer = server.client.post(f"/v1/profiles/{done['profile']}/allocations", json=asked).json()
    assert answer["data"][0]["allocation"]["weight_bytes"] == done["result"]["plan_bytes"]
    given = server.submit(profile=done["profile"], budget="4bpw")
    assert server.wait(given["id"])["result"]["plan_bytes"] == done["result"]["plan_bytes"]


def test_a_dry_run_says_what_a_job_would_take_and_submits_nothing(
    server: Served, done: dict[str, Any]
) -> None:
    before = server.client.get("/v1/jobs").json()["first_id"]
    body = {**SMALL_JOB, "model": "llama", "budget": "4bpw"}
    answer = server.client.post("/v1/jobs", params={"dry_run": "true"}, json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["budget_bytes"] == done["result"]["budget_bytes"]
    assert answer.json()["model"] == "llama"
    assert answer.json()["peak_memory_bytes"] > 0
    assert server.client.get("/v1/jobs").json()["first_id"] == before
    impossible = server.client.post(
        "/v1/jobs", params={"dry_run": "true"}, json=body | {"budget": "0.5bpw"}
    )
    assert (impossible.status_code, impossible.json()["type"]) == (
        422,
        "urn:bitwright:problem:budget-infeasible",
    )
    assert impossible.json()["nearest_bytes"] > 0


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


def test_a_stage_gets_an_allow_list_of_variables_and_gives_way(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    from service.process import stage_environment

    monkeypatch.setenv("BITWRIGHT_DATABASE_URL", "postgresql://me:hunter2@host/x")
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    monkeypatch.setenv("AWS_REGION", "here")
    found = stage_environment()
    assert "hunter2" not in str(found)
    assert found["AWS_REGION"] == "here"
    job = server.submit(calibration_windows=64, budget="3.1bpw", seed=7)
    while not server.stages():
        time.sleep(0.02)
    (stage,) = server.stages()
    end = time.monotonic() + 20
    while stage.nice() != 10 and time.monotonic() < end:
        time.sleep(0.05)
    assert stage.nice() == 10
    assert os.getpgid(stage.pid) == stage.pid
    assert "profile" in command_line(stage)
    server.client.post(f"/v1/jobs/{job['id']}/cancel")
    server.wait(job["id"])


def test_lists_are_filtered_by_status_and_label(server: Served, done: dict[str, Any]) -> None:
    found = server.client.get(
        "/v1/jobs", params={"label": "team:kernels", "status": "succeeded", "limit": 100}
    ).json()
    assert done["id"] in [job["id"] for job in found["data"]]
    assert all(job["labels"]["team"] == "kernels" for job in found["data"])
    assert server.client.get("/v1/jobs", params={"label": "team:nobody"}).json()["data"] == []
    one = server.client.get("/v1/jobs", params={"limit": 1}).json()
    assert one["has_more"]
    two = server.client.get("/v1/jobs", params={"limit": 1, "after": one["last_id"]}).json()
    assert two["data"][0]["id"] < one["data"][0]["id"]


def test_metrics_count_jobs_requests_and_seconds_of_stages(
    server: Served, done: dict[str, Any]
) -> None:
    del done
    text = server.client.get("/metrics").text
    for wanted in (
        'bitwright_jobs{status="succeeded"}',
        'bitwright_stage_seconds_count{stage="profile"}',
        "bitwright_queue_oldest_seconds",
    ):
        assert (
            float(
                next(line for line in text.splitlines() if line.startswith(wanted)).rsplit(" ", 1)[
                    1
                ]
            )
            >= 0
        )
    assert 'route="/v1/jobs/{job_id}"' in text
    assert "job_0" not in text


def test_logs_are_json_with_the_job_and_without_secrets(
    server: Served, done: dict[str, Any]
) -> None:
    lines = [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]
    ours = [line for line in lines if line.get("job_id") == done["id"]]
    assert {line["stage"] for line in ours if "stage" in line} == set(STAGES)
    assert all({"event", "level", "timestamp", "logger"} <= set(line) for line in lines)


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
    from concurrent.futures import ThreadPoolExecutor

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
