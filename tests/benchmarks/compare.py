"""Compare ways to profile and plan with the best uniform plan, at equal bytes.

Each plan is quantized in full and scored from its files.

    python -m tests.benchmarks.compare MODEL --label NAME --calibration TEXT --evaluation TEXT \
        --cache FOLDER

Appends one row for each budget and method to results/plans.jsonl. Finished stages are kept in the
cache, so it can be stopped and started again. `uniform` is the best of the uniform plans of the
menu by its measured KL on the evaluation text itself: a line that is harder to beat than any that
could be chosen beforehand.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from allocator.allocate import allocate
from allocator.answers.uniform import uniform_plans
from quantizer.plans.plan import Plan
from quantizer.running.quality import Quality
from service.cli.progress import Lines
from service.request.options import RunOptions
from service.request.request import Method, RunRequest
from service.single_stages import profile_task
from service.stages.calibration_windows import text_windows
from service.stages.checkpoint import make_checkpoint
from service.stages.context import RunContext
from service.stages.evaluation import evaluate
from service.stages.plan import uniform_name
from service.stages.prepare import prepare
from service.stages.profile import measure_profile
from service.storage.stage_store import StageStore
from tests.benchmarks.record import circumstances

RESULTS = Path(__file__).parent / "results" / "plans.jsonl"

METHODS = {
    "additive, original context": Method("output", "none", in_original=True),
    "additive, quantized context": Method("output", "none"),
    "block coupling": Method("output", "block"),
    "full coupling": Method("output", "full"),
    "gradient": Method("gradient", "full"),
    "noise": Method("noise", "none"),
    "hessian": Method("hessian", "none"),
    "integral": Method("integral", "none"),
}


def request_of(arguments: argparse.Namespace, budget: str, method: Method) -> RunRequest:
    """Return the request of one budget and method."""
    options = RunOptions(
        model=arguments.model,
        budget=f"{budget}bpw",
        calibration=arguments.calibration,
        evaluation=arguments.evaluation,
        evaluation_windows=arguments.windows,
        tokens=arguments.tokens,
        group_size=arguments.group_size,
        signal=method.signal,
        coupling=method.coupling,
        context="original" if method.in_original else "uniform",
        seed=arguments.seed,
        device="cpu",
    )
    return options.to_request()


def plans_at(
    arguments: argparse.Namespace, store: StageStore, budget: str
) -> dict[str, dict[str, Any]]:
    """Return by name the plan of each method, and the uniform plans.

    With each, its prediction and the seconds that its profile took.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in arguments.methods:
        request = request_of(arguments, budget, METHODS[name])
        context = RunContext.for_request(request, store, Lines())
        prepared = prepare(context, request)
        start = time.monotonic()
        profile = measure_profile(context, profile_task(context, request, prepared))
        seconds = time.monotonic() - start
        allocation = allocate(profile.with_coupling(METHODS[name].coupling), prepared.budget_bytes)
        found[name] = {
            "plan": allocation.plan,
            "predicted": allocation.predicted_loss,
            "seconds": seconds,
            "tokens": profile.tokens,
        }
    for plan in uniform_plans(prepared.layers, prepared.menu.fidelities, prepared.budget_bytes):
        found[uniform_name(plan)] = {"plan": plan}
    return found


def score(
    arguments: argparse.Namespace, store: StageStore, budget: str, plans: dict[str, Plan]
) -> dict[str, Quality]:
    """Quantize plans in full; return their quality on the evaluation text, from the saved files."""
    request = request_of(arguments, budget, METHODS["integral"])
    context = RunContext.for_request(request, store, Lines())
    calibration = text_windows(context, request.amounts.calibration)
    folders = {
        name: make_checkpoint(context, plan, calibration, f"{budget} {name}")
        for name, plan in plans.items()
    }
    return evaluate(context, folders, text_windows(context, request.amounts.evaluation))


def rows_at(arguments: argparse.Namespace, store: StageStore, budget: str) -> list[dict[str, Any]]:
    """Return the rows of one budget, the best uniform plan first."""
    plans = plans_at(arguments, store, budget)
    quality = score(
        arguments, store, budget, {name: found["plan"] for name, found in plans.items()}
    )
    uniform = min(
        (name for name in plans if name.startswith("uniform")),
        key=lambda name: quality[name].kl_nats_per_token,
    )
    names = [uniform, *(name for name in plans if not name.startswith("uniform"))]
    return [
        {
            "model": arguments.label,
            "budget_bpw": float(budget),
            "method": name,
            "plan_bytes": plans[name]["plan"].weight_bytes,
            "bits_per_weight": plans[name]["plan"].bits_per_weight,
            "quality": quality[name].to_json(),
            "kl_to_uniform": quality[name].kl_nats_per_token / quality[uniform].kl_nats_per_token,
            "predicted_kl": plans[name].get("predicted"),
            "profile_seconds": plans[name].get("seconds"),
            "probe_tokens": plans[name].get("tokens"),
            "uniform_plans": {
                n: quality[n].kl_nats_per_token for n in plans if n.startswith("uniform")
            },
            "seed": arguments.seed,
            "circumstances": circumstances(),
        }
        for name in names
    ]


def main() -> None:
    """Measure and store the rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--label", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--budgets", nargs="+", default=["2.3", "2.5", "3.0", "3.5"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--group-size", type=int)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    store = StageStore(arguments.cache)
    for budget in arguments.budgets:
        rows = rows_at(arguments, store, budget)
        with RESULTS.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        for row in rows:
            print(
                f"{budget} {row['method']:32} KL {row['quality']['kl_nats_per_token']:.4f}  x "
                f"uniform {row['kl_to_uniform']:.3f}"
            )


if __name__ == "__main__":
    main()
