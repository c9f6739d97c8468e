"""Jobs while workers, servers and databases are killed at random.

Every byte is compared with undisturbed jobs.

    python -m tests.benchmarks.kills [--jobs 40] [--kills 20]

Appends a row for SQLite and one for PostgreSQL to results/service.jsonl. Fails where anything is
lost, half-written or different.
"""

import argparse
import json
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from service.request.stage_names import STAGES
from tests.benchmarks.record import circumstances
from tests.support.crashes import Count, calm_results, soak
from tests.support.postgres import Postgres
from tests.support.tiny_models import save_tiny

RESULTS = Path(__file__).parent / "results" / "service.jsonl"


def main() -> None:
    """Run on both kinds of database."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=40)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--kind", choices=["sqlite", "postgresql"], action="append")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder) / "models"
        save_tiny(models / "llama", "llama")
        start = time.monotonic()
        expected = calm_results(Path(folder) / "calm", models, arguments.jobs)
        calm_seconds = time.monotonic() - start
        pause = calm_seconds / max(arguments.kills, 1) / 2
        for kind in arguments.kind or ["sqlite", "postgresql"]:
            postgres = Postgres() if kind == "postgresql" else None
            where = Path(folder) / kind
            found = soak(
                where,
                models,
                expected,
                arguments.kills,
                postgres=postgres,
                seed=arguments.seed,
                pause_seconds=pause,
            )
            keep(kind, found, calm_seconds)
            if postgres is not None:
                postgres.remove()


def keep(kind: str, found: Count, calm_seconds: float) -> None:
    """Store the row of one kind of database; what was lost or different would have raised."""
    row = {
        "benchmark": "kills",
        "database": kind,
        "jobs": found.jobs,
        "kills": dict(found.kills),
        "stages": len(STAGES) * found.jobs,
        "stage_starts": found.stage_starts,
        "seconds": round(found.seconds),
        "undisturbed_seconds": round(calm_seconds),
        "sampled_two_stages_of_a_job": found.twice_at_once,
        "lost": 0,
        "different": 0,
        "dbos": version("dbos"),
        "circumstances": circumstances(),
    }
    print(json.dumps(row), flush=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
