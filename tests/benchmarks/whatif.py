"""How fast what-ifs are answered and how good the answers are proven to be.

On measured and on synthetic profiles.

    python -m tests.benchmarks.whatif

Appends one row for each problem to results/whatif.jsonl: seconds to make ready, median and 99th
percentile of a what-if over 1,000 random budgets, the gap of its plans, a frontier of 100 points
from nothing, and the time of CVXPY with its default solver, which builds the same model anew for
each budget, in the same run.
"""

import json
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from allocator.answers.frontier import budgets_between, frontier
from allocator.answers.whatif import WhatIf
from allocator.demands.constraints import Constraints
from allocator.profile import Profile
from allocator.solver.cvxpy_reference import AllocationProblem
from tests.benchmarks.problems import llama_70b, mixture_of_experts
from tests.benchmarks.record import circumstances
from tests.support.stored_profiles import stored_profile

RESULTS = Path(__file__).parent / "results" / "whatif.jsonl"
ASKED = 1000
ANEW = 5


@dataclass(frozen=True, slots=True)
class Problem:
    """One row of the benchmark: budgets are drawn between `low` and `high` bits per weight."""

    name: str
    profile: Profile
    constraints: Constraints
    low: float
    high: float


def problems() -> list[Problem]:
    """Return the problems, the real ones first."""
    free = Constraints()
    return [
        Problem("SmolLM2-135M, integral", stored_profile("smollm2-135m-integral"), free, 2.23, 4.5),
        Problem(
            "SmolLM2-135M, output, full coupling",
            stored_profile("smollm2-135m-output"),
            free,
            2.23,
            4.5,
        ),
        Problem("70B-class, made up", llama_70b(), free, 2.23, 4.5),
        Problem(
            "48 x 128 experts x 3, tied for llama.cpp",
            mixture_of_experts(),
            Constraints(target="llama.cpp"),
            2.23,
            4.5,
        ),
        Problem(
            "48 x 128 experts x 3, tied for vLLM",
            mixture_of_experts(),
            Constraints(target="vllm"),
            2.23,
            4.5,
        ),
    ]


def measure(problem: Problem) -> dict[str, Any]:
    """Return the row of one problem."""
    weights = sum(layer.weights for layer in problem.profile.layers)
    low, high = (int(bits * weights / 8) for bits in (problem.low, problem.high))
    start = time.perf_counter()
    points = frontier(WhatIf(problem.profile, problem.constraints), budgets_between(low, high, 100))
    frontier_seconds = time.perf_counter() - start

    start = time.perf_counter()
    whatif = WhatIf(problem.profile, problem.constraints)
    setup_seconds = time.perf_counter() - start
    start = time.perf_counter()
    whatif.plan((low + high) // 2)
    first_seconds = time.perf_counter() - start
    start = time.perf_counter()
    whatif.curve.prepare()
    prepare_seconds = time.perf_counter() - start
    times, gaps, slack = [], [], []
    for budget in np.random.default_rng(0).integers(low, high, ASKED).tolist():
        start = time.perf_counter()
        found = whatif.plan(budget)
        times.append(time.perf_counter() - start)
        gaps.append(found.gap)
        slack.append(found.slack_bytes / budget)

    anew = []
    for budget in np.linspace(low, high, ANEW + 2).astype(int).tolist()[1:-1]:
        start = time.perf_counter()
        AllocationProblem(whatif.program).solve(budget, solver=None)
        anew.append(time.perf_counter() - start)
    rank, groups, directions = whatif.program.basis.shape
    return {
        "problem": problem.name,
        "layers": len(problem.profile.layers),
        "groups": groups,
        "fidelities": len(problem.profile.fidelities),
        "rank": rank,
        "directions": directions,
        "budgets_bpw": [problem.low, problem.high],
        "setup_ms": 1e3 * setup_seconds,
        "first_ms": 1e3 * first_seconds,
        "prepare_seconds": prepare_seconds,
        "solves": whatif.curve.solves,
        "asked": ASKED,
        "p50_ms": 1e3 * float(np.median(times)),
        "p99_ms": 1e3 * float(np.quantile(times, 0.99)),
        "gap_p50": float(np.median(gaps)),
        "gap_p99": float(np.quantile(gaps, 0.99)),
        "gap_max": max(gaps),
        "slack_p50": float(np.median(slack)),
        "frontier_seconds": frontier_seconds,
        "frontier_points": len(points),
        "knees": sum(point.knee for point in points),
        "cvxpy_anew_ms": 1e3 * float(np.median(anew)),
        "versions": {package: version(package) for package in ("osqp", "cvxpy", "numpy", "scipy")},
        "circumstances": circumstances(),
    }


def main() -> None:
    """Measure and store."""
    for problem in problems():
        row = measure(problem)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"{row['problem']:42} p50 {row['p50_ms']:.1f} ms, p99 {row['p99_ms']:.1f} ms, gap "
            f"{row['gap_p50']:.2%} / "
            f"{row['gap_p99']:.2%} / {row['gap_max']:.2%}, ready {row['prepare_seconds']:.1f} s, "
            f"first {row['first_ms']:.0f} ms, "
            f"frontier {row['frontier_seconds']:.2f} s, CVXPY anew {row['cvxpy_anew_ms']:.0f} ms",
            flush=True,
        )


if __name__ == "__main__":
    main()
