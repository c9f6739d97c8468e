"""How the service answers under load, on this machine, over loopback.

    python -m tests.benchmarks.load [--model FILE]

What-ifs on the real SmolLM2 profile at 20 requests a second while a job runs, and lists and polls
with 1,000 queued jobs beside the same with ten. Appends rows to results/service.jsonl. The job is
on the demo model where its file is given, else on a tiny one.
"""

import argparse
import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

from tests.benchmarks.record import circumstances
from tests.support.served import SMALL_JOB, Served, served
from tests.support.stored_profiles import FOLDER
from tests.support.tiny_models import save_tiny

RESULTS = Path(__file__).parent / "results" / "service.jsonl"
PROFILE = "smollm2-135m-integral"
PER_SECOND, SECONDS = 20, 60


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = arguments.model.parent if arguments.model else Path(folder) / "models"
        if arguments.model is None:
            save_tiny(models / "llama", "llama")
        with served(Path(folder) / "a", models) as server:
            keep(what_ifs(server, arguments.model.name if arguments.model else None))
        with served(Path(folder) / "b", models, "--no-worker") as server:
            keep(queue(server))


def keep(row: dict[str, Any]) -> None:
    """Store a row."""
    row |= {
        "fastapi": version("fastapi"),
        "uvicorn": version("uvicorn"),
        "circumstances": circumstances(),
    }
    print(json.dumps(row))
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")


def what_ifs(server: Served, model: str | None) -> dict[str, Any]:
    """Ask for random budgets at a steady rate while a job runs.

    Times are from when a request was due to its last byte.
    """
    files = {
        "head": (FOLDER / f"{PROFILE}.json").read_bytes(),
        "arrays": (FOLDER / f"{PROFILE}.npz").read_bytes(),
    }
    digest = server.client.post("/v1/profiles", files=files).json()["digest"]
    url = f"/v1/profiles/{digest}/allocations"
    server.client.post(url, json={"questions": [{"budget": "2.5bpw"}]})
    options = (
        {"model": model, "calibration_windows": 8, "tokens": 512}
        if model
        else {"calibration_windows": 64}
    )
    job = server.submit(**options)
    while not server.stages():
        time.sleep(0.1)
    time.sleep(8)  # until torch is loaded and computes
    chance = np.random.default_rng(0)
    budgets = [f"{bits:.4f}bpw" for bits in chance.uniform(2.25, 4.4, PER_SECOND * SECONDS)]
    start, seconds, busy = time.perf_counter(), [0.0] * len(budgets), 0

    def ask(number: int) -> None:
        nonlocal busy
        due = start + number / PER_SECOND
        time.sleep(max(0.0, due - time.perf_counter()))
        answer = server.client.post(url, json={"questions": [{"budget": budgets[number]}]})
        seconds[number] = time.perf_counter() - due
        assert answer.status_code == 200, answer.text
        busy += bool(server.stages()) if number % 100 == 0 else 0

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(len(budgets))))
    server.client.post(f"/v1/jobs/{job['id']}/cancel")
    server.wait(job["id"])
    row = percentiles("what_if", [1e3 * each for each in seconds])
    return (
        {
            "benchmark": "what-ifs while a job runs",
            "model": model or "tiny",
            "requests_per_second": PER_SECOND,
        }
        | row
        | {"samples_with_a_stage": busy, "samples": len(budgets) // 100}
    )


def queue(server: Served) -> dict[str, Any]:
    """List and poll with ten jobs in the queue, and with a thousand."""
    row: dict[str, Any] = {"benchmark": "list and poll"}
    ids = submit(server, 10)
    row |= polls(server, ids, "10")
    start = time.perf_counter()
    ids += submit(server, 990)
    row["submissions_per_second"] = round(990 / (time.perf_counter() - start), 1)
    return row | polls(server, ids, "1000")


def submit(server: Served, count: int) -> list[str]:
    """Queue jobs, four at a time."""
    here = Path(server.variables["BITWRIGHT_MODELS"]) / "llama"
    body = {**SMALL_JOB, "model": "llama" if here.exists() else ".", "budget": "4bpw"}

    def one(number: int) -> str:
        answer = server.client.post("/v1/jobs", json=body | {"labels": {"number": str(number)}})
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(one, range(count)))


def polls(server: Served, ids: list[str], name: str) -> dict[str, Any]:
    """Time pages of 100 and single jobs, with and without their entity tag, by one client."""
    times: dict[str, list[float]] = {"list": [], "poll": [], "unchanged": []}

    def timed(kind: str, path: str, **headers: str) -> httpx2.Response:
        begin = time.perf_counter()
        answer = server.client.get(path, headers=headers)
        times[kind].append(1e3 * (time.perf_counter() - begin))
        return answer

    chance = np.random.default_rng(1)
    for _ in range(200):
        job = ids[int(chance.integers(len(ids)))]
        timed("list", "/v1/jobs?limit=10")
        tag = timed("poll", f"/v1/jobs/{job}").headers["etag"]
        assert timed("unchanged", f"/v1/jobs/{job}", **{"If-None-Match": tag}).status_code == 304
    found: dict[str, Any] = {}
    for kind, values in times.items():
        found |= percentiles(f"{kind}_{name}", values)
    return found


def percentiles(name: str, milliseconds: list[float]) -> dict[str, float]:
    """Return median, 99th percentile and maximum."""
    p50, p99 = np.percentile(milliseconds, [50, 99])
    return {
        f"{name}_p50_ms": round(p50, 2),
        f"{name}_p99_ms": round(p99, 2),
        f"{name}_max_ms": round(max(milliseconds), 2),
    }


if __name__ == "__main__":
    main()
