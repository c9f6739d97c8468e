"""What a job gives over HTTP, run by a real server: figures, files, events, a profile."""

import io
import json
import tarfile
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import quantizer  # noqa: F401  teaches transformers the format
from service.request.stage_names import STAGES
from tests.support.commands import bitwright_json
from tests.support.served import SMALL_JOB, Served


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
