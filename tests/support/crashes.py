"""Jobs under random kills, and what must hold afterwards."""

import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx2
import psutil

from tests.support.postgres import Postgres
from tests.support.served import ENDED, SMALL_JOB, Served, command_line, kill

BUDGETS = ("3bpw", "3.2bpw", "3.4bpw", "3.6bpw", "3.8bpw", "4bpw", "4.2bpw", "4.4bpw")
TWO_SLOTS = {"BITWRIGHT_SLOTS": "2"}
_TIMED = ("report.json", "report.html")
"""Artifacts that hold times, so that no two are equal."""


@dataclass
class Count:
    """Figures of a run under kills."""

    jobs: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    stage_starts: int = 0
    seconds: float = 0.0
    twice_at_once: int = 0


class Watch:
    """Samples the processes of stages, and counts when two of one job run at once."""

    def __init__(self, marker: str) -> None:
        """Watch stages whose command line holds `marker`."""
        self.twice_at_once = 0
        self._marker, self._stop = marker, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._stop.wait(0.1):
            found: Counter[str] = Counter()
            for process in psutil.process_iter():
                arguments = command_line(process)
                if "service.stage_process.command" in arguments and any(
                    self._marker in part for part in arguments
                ):
                    found[arguments[arguments.index("--job") + 1]] += 1
            self.twice_at_once += sum(count > 1 for count in found.values())

    def stop(self) -> None:
        """Stop watching."""
        self._stop.set()
        self._thread.join()


def submit_all(server: Served, count: int) -> list[str]:
    """Submit jobs with different budgets and texts, each under an idempotency key of its own.

    So does a client that repeats requests that failed.
    """
    ids = []
    for number in range(count):
        body = {
            **SMALL_JOB,
            "model": "llama",
            "budget": BUDGETS[number % len(BUDGETS)],
            "seed": number // len(BUDGETS),
        }
        answer = server.client.post(
            "/v1/jobs", json=body, headers={"Idempotency-Key": f"job {number}"}
        )
        assert answer.status_code == 202, answer.text
        ids.append(str(answer.json()["id"]))
    return ids


def disturb(
    server: Served, kills: int, pause_seconds: float, seed: int, postgres: Postgres | None
) -> Counter[str]:
    """Kill workers and servers at random times.

    In the middle, stop the database at once and start it again.
    """
    chance, done = random.Random(seed), Counter[str]()  # noqa: S311
    for number in range(kills):
        time.sleep(chance.uniform(0.2, 2 * pause_seconds))
        if postgres is not None and number == kills // 2:
            postgres.stop_at_once()
            time.sleep(3)
            postgres.start()
            done["database"] += 1
        workers = server.workers()
        if workers and chance.random() < 0.6:
            kill(workers[0].pid)
            done["worker"] += 1
        else:
            kill(server.process.pid)
            server.process.wait()
            server.start()
            done["server"] += 1
    return done


def finish(server: Served, ids: list[str], seconds: float) -> list[dict[str, Any]]:
    """Wait until all jobs have ended, and return them."""
    end, jobs = time.monotonic() + seconds, list[dict[str, Any]]()
    while time.monotonic() < end:
        try:
            jobs = [server.client.get(f"/v1/jobs/{job_id}").json() for job_id in ids]
        except httpx2.HTTPError:
            time.sleep(1)
            continue
        if all(job.get("status") in ENDED for job in jobs):
            return jobs
        time.sleep(1)
    raise AssertionError(
        f"not ended after {seconds} s: "
        f"{Counter(job.get('status') for job in jobs)}\n{server.log[-8000:]}"
    )


def results_of(server: Served, job: dict[str, Any]) -> dict[str, str]:
    """Return the checksums of what a job made, after comparing them with the bytes.

    Without what tells times.
    """
    found = {}
    for row in server.client.get(f"/v1/jobs/{job['id']}/artifacts").json()["data"]:
        content = server.client.get(row["url"]).content
        assert sha256(content).hexdigest() == row["sha256"], row
        assert len(content) == row["size_bytes"], row
        if row["name"] not in _TIMED:
            found[row["name"]] = row["sha256"]
    assert "model.safetensors" in found
    return found


def nothing_half_written(artifacts: Path) -> None:
    """Every place in the store has a manifest and no file beside what it names."""
    for place in (artifacts / "jobs").iterdir():
        assert (place / "manifest.json").is_file(), place
        assert not [path for path in place.rglob("*") if path.name.startswith(".")], place


def calm_results(folder: Path, models: Path, jobs: int) -> list[dict[str, str]]:
    """Return the checksums of the results of undisturbed jobs, in a service of their own."""
    server = Served(folder, models, variables=TWO_SLOTS)
    try:
        return [
            results_of(server, job) for job in finish(server, submit_all(server, jobs), 120 * jobs)
        ]
    finally:
        server.stop()


def soak(
    folder: Path,
    models: Path,
    expected: list[dict[str, str]],
    kills: int,
    *,
    postgres: Postgres | None,
    seed: int = 0,
    pause_seconds: float = 3.0,
) -> Count:
    """Run jobs under kills, check that they make what is expected and all else that must hold.

    Return the figures.
    """
    start = time.monotonic()
    jobs = len(expected)
    variables = dict(TWO_SLOTS)
    if postgres is not None:
        variables |= {
            "BITWRIGHT_DATABASE_URL": postgres.fresh(f"soak_{seed}_{int(time.time())}"),
            "BITWRIGHT_WORKER": "soaked",
        }
    server = Served(folder, models, variables=variables)
    watch = Watch(str(folder))
    try:
        ids = submit_all(server, jobs)
        assert len(set(ids)) == jobs
        done = disturb(server, kills, pause_seconds, seed, postgres)
        assert submit_all(server, jobs) == ids, "the same keys must give the same jobs"
        ended = finish(server, ids, 120 * jobs)
        assert Counter(job["status"] for job in ended) == {"succeeded": jobs}, [
            job["error"] for job in ended
        ]
        assert [results_of(server, job) for job in ended] == expected
        nothing_half_written(folder / "data" / "artifacts")
        starts = sum(stage["starts"] for job in ended for stage in job["stages"])
    finally:
        watch.stop()
        server.stop()
    return Count(jobs, done, starts, time.monotonic() - start, watch.twice_at_once)
