"""How much plans depend on the calibration text.

Several seeds and corpora, scored on the same held-out text.

    python -m tests.benchmarks.stability MODEL --label NAME --corpora A.txt B.txt \
        --evaluation TEXT --cache FOLDER

Appends one row for each corpus and seed to results/stability.jsonl, and prints how much the plans
agree.
"""

import argparse
import json
from pathlib import Path

from service.storage.stage_store import StageStore
from tests.benchmarks.compare import METHODS, plans_at, score
from tests.benchmarks.quality_tables import agreement
from tests.benchmarks.record import circumstances

RESULTS = Path(__file__).parent / "results" / "stability.jsonl"


def main() -> None:
    """Measure, store and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--label", required=True)
    parser.add_argument("--corpora", nargs="+", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--budget", default="2.5")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--group-size", type=int)
    arguments = parser.parse_args()
    arguments.methods = ["integral"]
    store, rows = StageStore(arguments.cache), []
    for corpus in arguments.corpora:
        for seed in arguments.seeds:
            arguments.calibration, arguments.seed = corpus, seed
            plan = plans_at(arguments, store, arguments.budget)["integral"]["plan"]
            quality = score(arguments, store, arguments.budget, {"integral": plan})["integral"]
            rows.append(
                {
                    "model": arguments.label,
                    "budget_bpw": float(arguments.budget),
                    "corpus": Path(corpus).name,
                    "seed": seed,
                    "signal": METHODS["integral"].signal,
                    "fidelities": [fidelity.name for fidelity in plan.fidelities],
                    "layer_bits": [
                        8 * size / layer.weights
                        for size, layer in zip(plan.layer_bytes, plan.layers, strict=True)
                    ],
                    "quality": quality.to_json(),
                    "circumstances": circumstances(),
                }
            )
            with RESULTS.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(f"{Path(corpus).name} seed {seed}: KL {quality.kl_nats_per_token:.4f}")
    print("all", agreement(rows))
    for corpus in arguments.corpora:
        print(
            Path(corpus).name,
            agreement([row for row in rows if row["corpus"] == Path(corpus).name]),
        )


if __name__ == "__main__":
    main()
