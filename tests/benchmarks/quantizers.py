"""Compare quantizers at equal bytes.

Light methods, each source method alone, and the levels of effort.

    python -m tests.benchmarks.quantizers MODEL --label NAME --calibration TEXT --evaluation TEXT \
        --cache FOLDER
    python -m tests.benchmarks.quantizers ... --whole

Appends one row for each budget and method to results/quantizers.jsonl. Every checkpoint is made in
a process of its own, whose peak memory is the row's, and scored from its files. Finished stages are
kept in the cache: it can be stopped and started again; seconds, and seconds of processors, are
those of stages that were not there yet, and missing where all were. The second command scores what
the first one made on all of the evaluation text, and appends that to its rows.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from allocator.allocate import allocate
from allocator.answers.uniform import likely_uniform_plans, uniform_plan
from allocator.profile import Profile
from quantizer.importance.saliency import RULES
from quantizer.plans.fidelity import Fidelity
from quantizer.plans.plan import Plan
from quantizer.texts.text import TextSpec
from service.cli.progress import Lines
from service.logs import set_up_logging
from service.process import keep_freed_memory
from service.request.effort import FAST, find_effort
from service.request.options import RunOptions
from service.request.request import RunRequest
from service.single_stages import profile_task
from service.stages.calibration_windows import quantizing_windows, text_windows
from service.stages.context import RunContext
from service.stages.evaluation import evaluate
from service.stages.prepare import prepare
from service.stages.profile import measure_profile
from service.stages.recipe import CLIPPING, DEFAULT_RECIPE, RECIPES, SCALES, Recipe
from service.stages.requantize import quantize_by_recipe
from service.stages.training import train
from service.stages.training_phases import Phase
from service.stages.training_task import TrainingRequest, training_task
from service.storage.stage_store import StageStore
from tests.benchmarks.record import circumstances

RESULTS = Path(__file__).parent / "results" / "quantizers.jsonl"
OTHER = "builtin:evaluation"
"""Text of another kind than what layers are quantized and trained on."""
KEPT = 1.0
"""Seconds below which a stage was not made but found."""

T = TypeVar("T")
Scores = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """How the checkpoint of one row comes about.

    Attributes:
        plan: `uniform`, the best of the uniform plans by the profile; `solved`; or a kind of
            fidelity by budget, whose high-impact share, the same for all layers, fills the budget.
        recipe: how it is quantized and trained.
        effort: how much.
        text: the effort whose share of the calibration text layers are quantized on, if not its
            own.
    """

    plan: str | Mapping[str, str]
    recipe: Recipe = DEFAULT_RECIPE
    effort: str = FAST
    text: str | None = None


PLAIN = {
    "2.3": "int2+3r0.1g128",
    "2.5": "int2+3r0.1g128",
    "3.0": "int2+3r0.1g128",
    "4.25": "int4+8r0.1g128",
}
"""Kinds with 16-bit scales, which light methods are published with."""
ADAPTED = {
    "2.3": "int2+3r0.1g64s6a2",
    "2.5": "int2+3r0.1g64s6a4",
    "3.0": "int2+3r0.1g64s6a8",
    "4.25": "int3+4r0.1g64s6a8",
}
"""Kinds with an adapter that leaves room for its bytes."""
SPARSE = {
    "2.3": "int2+3r0.1g128s6o0.002",
    "2.5": "int2+3r0.1g128s6o0.005",
    "3.0": "int2+3r0.1g128s6o0.005",
    "4.25": "int3+4r0.1g128s6o0.005",
}
"""Kinds with outliers that leave room for their bytes."""


TRAINED = "balanced"
"""The effort of single methods that train."""
BEST = "best"


def _sgr(rule: str) -> Row:
    return Row(
        "uniform", replace(RECIPES["sgr-q"], parameters=replace(SCALES, salient=rule)), TRAINED
    )


def _signiq(penalty: float) -> Row:
    return Row(
        ADAPTED, replace(RECIPES["signiq"], parameters=replace(CLIPPING, penalty=penalty)), TRAINED
    )


ROWS = {
    "round to nearest": Row(PLAIN, RECIPES["rtn"]),
    "GPTQ": Row("uniform"),
    "GPTQ, more text": Row("uniform", text=BEST),
    "outliers": Row(SPARSE),
    "ReQuant": Row(SPARSE, RECIPES["requant"]),
    **{f"SGR-Q, scales of {rule}": _sgr(rule) for rule in RULES},
    "ApiQ": Row(ADAPTED, RECIPES["apiq"], TRAINED),
    **{f"SigniQ, lambda {each}": _signiq(each) for each in (0.01, 0.1, 1.0, 10.0, 100.0)},
    "block-wise": Row("solved", RECIPES["blockwise"], TRAINED),
    "fast": Row("solved"),
    "balanced": Row("solved", effort="balanced"),
    "best": Row("solved", effort=BEST),
}
ALL = "whole"
"""Name of the score on all of the evaluation text."""


class Spent:
    """What stages took that were not there yet: in all, and of all processors together."""

    def __init__(self) -> None:
        """Begin with none."""
        self.seconds: dict[str, float | None] = {}
        self.processor_seconds: dict[str, float | None] = {}

    def timed(self, stage: str, work: Callable[[], T]) -> T:
        """Return what a stage makes, and keep what it took."""
        start, processor_start = time.monotonic(), time.process_time()
        result = work()
        seconds = time.monotonic() - start
        made = seconds >= KEPT
        self.seconds[stage] = seconds if made else None
        self.processor_seconds[stage] = time.process_time() - processor_start if made else None
        return result


def request_of(arguments: argparse.Namespace, budget: str, effort: str) -> RunRequest:
    """Return the request of one budget and effort."""
    options = RunOptions(
        model=arguments.model,
        budget=f"{budget}bpw",
        calibration=arguments.calibration,
        evaluation=arguments.evaluation,
        evaluation_windows=arguments.windows,
        tokens=arguments.tokens,
        effort=effort,
        seed=arguments.seed,
        device=arguments.device,
    )
    return options.to_request()


def plan_of(
    kind: str | Mapping[str, str],
    profile: Profile,
    request: RunRequest,
    budget: str,
    budget_bytes: int,
) -> Plan:
    """Return the uniform plan of the budget, or the solver's."""
    if not isinstance(kind, str):
        return uniform_plan(profile.layers, Fidelity.parse(kind[budget]), budget_bytes)
    if kind == "uniform":
        return likely_uniform_plans(profile, budget_bytes)[0]
    return allocate(profile.with_coupling(request.method.coupling), budget_bytes).plan


@dataclass(frozen=True)
class Made:
    """One checkpoint, and how it came about."""

    context: RunContext
    request: RunRequest
    plan: Plan
    folder: Path
    phases: tuple[Phase, ...]
    spent: Spent


def make(arguments: argparse.Namespace, budget: str, method: str) -> Made:
    """Make one checkpoint, or find it."""
    row, spent = ROWS[method], Spent()
    request = request_of(arguments, budget, row.effort)
    context = RunContext.for_request(request, StageStore(arguments.cache), Lines())
    prepared = prepare(context, request)
    profile = spent.timed(
        "profile",
        lambda: measure_profile(context, profile_task(context, request, prepared)),
    )
    plan = plan_of(row.plan, profile, request, budget, prepared.budget_bytes)
    text = request.amounts.calibration
    held_out = text_windows(context, request.amounts.guard)
    effort = find_effort(row.text or row.effort)
    calibration = quantizing_windows(context, text, held_out, effort)
    label = f"{budget} {method}"
    plan, folder = spent.timed(
        "quantize", lambda: quantize_by_recipe(context, row.recipe, plan, calibration, label)
    )
    wanted = TrainingRequest(row.recipe, request.effort, text, held_out, request.seed)
    training = training_task(context, plan, folder, wanted)
    if training.phases:
        folder = spent.timed("tune", lambda: train(context, training))
    return Made(context, request, plan, folder, training.phases, spent)


def score(made: Made, checkpoints: dict[str, Path], text: TextSpec, *, fast: bool) -> Scores:
    """Return the scores of the original and of checkpoints on one text."""
    windows = text_windows(made.context, text)
    qualities = evaluate(made.context, checkpoints, windows, fast=fast)
    return {name: quality.to_json() for name, quality in qualities.items()}


def on_gpu(device: str) -> dict[str, Any]:
    """Return which GPU this process used, and how much of its memory at most.

    Nothing for a processor.
    """
    return (
        {}
        if device == "cpu"
        else {
            "gpu": torch.cuda.get_device_name(),
            "gpu_peak_bytes": torch.cuda.max_memory_allocated(),
        }
    )


def row_of(arguments: argparse.Namespace, budget: str, method: str) -> dict[str, Any]:
    """Make and score one checkpoint; return its row without circumstances."""
    made = make(arguments, budget, method)
    texts = {"held out": made.request.amounts.evaluation, "other": TextSpec(OTHER, 16, 512, None)}
    scores = {
        name: score(made, {"it": made.folder}, text, fast=False) for name, text in texts.items()
    }
    return {
        "budget_bpw": float(budget),
        "method": method,
        "plan_bytes": made.plan.weight_bytes,
        "bits_per_weight": made.plan.bits_per_weight,
        "quality": {name: found["it"] for name, found in scores.items()},
        "original": {name: found["original"] for name, found in scores.items()},
        "phases": [phase.to_json() for phase in made.phases],
        "seconds": made.spent.seconds,
        "processor_seconds": made.spent.processor_seconds,
        "seed": arguments.seed,
    } | on_gpu(arguments.device)


def score_whole(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Score checkpoints, made before, on all of the evaluation text at once.

    Products are in the machine's fast precision.
    """
    made = {
        (budget, method): make(arguments, budget, method)
        for budget in arguments.budgets
        for method in arguments.methods
    }
    one = next(iter(made.values()))
    text = replace(one.request.amounts.evaluation, windows=0)
    scores = score(one, {" ".join(key): each.folder for key, each in made.items()}, text, fast=True)
    return [
        {
            "budget_bpw": float(budget),
            "method": method,
            "quality": {ALL: scores[f"{budget} {method}"]},
        }
        | {"original": {ALL: scores["original"]}}
        | on_gpu(arguments.device)
        for budget, method in made
    ]


def measure(arguments: argparse.Namespace, budget: str, method: str) -> dict[str, Any]:
    """Return the row of one checkpoint, made in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.quantizers",
        *sys.argv[1:],
        "--one",
        budget,
        method,
    ]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{method} at {budget} bpw failed")
        output.seek(0)
        row: dict[str, Any] = json.loads(output.read().splitlines()[-1])
    return (
        {"model": arguments.label}
        | row
        | {"peak_memory_bytes": usage.ru_maxrss * 1024, "circumstances": circumstances()}
    )


def store_rows(rows: list[dict[str, Any]]) -> None:
    """Append rows to the stored results."""
    with RESULTS.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def main() -> None:
    """Measure and store the rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--label", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--budgets", nargs="+", default=["2.3", "2.5", "3.0", "4.25"])
    parser.add_argument("--methods", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--whole",
        action="store_true",
        help="score checkpoints made before on all of the evaluation text",
    )
    parser.add_argument("--one", nargs=2, metavar=("BUDGET", "METHOD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one or arguments.whole:
        keep_freed_memory()
        set_up_logging()
    if arguments.one:
        print(json.dumps(row_of(arguments, *arguments.one)))
        return
    if arguments.whole:
        rows = score_whole(arguments)
        store_rows(
            [{"model": arguments.label} | row | {"circumstances": circumstances()} for row in rows]
        )
        return
    for budget in arguments.budgets:
        for method in arguments.methods:
            row = measure(arguments, budget, method)
            store_rows([row])
            held_out, other = row["quality"]["held out"], row["quality"]["other"]
            print(
                f"{budget} {method:20} perplexity {held_out['perplexity']:.1f} KL "
                f"{held_out['kl_nats_per_token']:.3f}, "
                f"other text {other['perplexity']:.1f} {other['kl_nats_per_token']:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
