"""The main path, from a model and a budget to a checkpoint with its report.

calibration -> profile -> plan -> quantize -> compare -> train -> evaluate -> report

Jobs call the stage that compares and trains `tune`; the windows that it compares on are called
`guard` in options.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import replace

from allocator.profile import Profile
from service.report.document import Report
from service.request.request import RunRequest
from service.stages.calibration_windows import cut_windows
from service.stages.checkpoint import make_checkpoint
from service.stages.clock import Clock
from service.stages.context import RunContext
from service.stages.delivery import Delivery
from service.stages.embeddings import choose_embeddings, measure_unquantized
from service.stages.evaluation import evaluate
from service.stages.plan import solve_plans
from service.stages.prediction_check import CheckTask, check_random_plans
from service.stages.prepare import prepare
from service.stages.profile import ProfileTask, measure_profile
from service.stages.progress import Reporter
from service.stages.report import build_report
from service.stages.results import RunResults
from service.stages.run_state import RunState
from service.stages.selection import select_plan
from service.stages.training import train_and_compare
from service.stages.training_task import TrainingRequest, training_task
from service.storage.stage_store import StageStore


def walk(
    request: RunRequest, store: StageStore, reporter: Reporter, given: Profile | None = None
) -> Iterator[RunState]:
    """Run stage by stage; yield the results after each of `service.request.stage_names.PIPELINE`.

    Every stage is stored under the hash of its inputs. So a run that was killed continues where it
    stopped, a similar budget uses the same profile, and a walk to a later stage only reads the
    results of the stages before it.

    Args:
        request: model, budget and options.
        store: where finished stages are stored.
        reporter: shows progress.
        given: a profile of this model; without one, it is measured.

    Raises:
        QuantizerError: model or text cannot be used.
        AllocatorError: the budget cannot be met, or the given profile is of another model.
        ServiceError: something could not be stored.
    """
    clock = Clock()
    with clock.time("prepare"):
        context = RunContext.for_request(request, store, reporter)
        prepared = prepare(context, request, given)
    windows = cut_windows(context, request)

    profiling = ProfileTask.for_request(request, prepared, windows.calibration, windows.probes)
    with clock.time("embedding and head"):
        unquantized = measure_unquantized(context, prepared, windows.calibration, windows.probes)
    with clock.time("profile"):
        profile = given or measure_profile(context, profiling, unquantized)
    yield (state := RunState("profile", profile))

    with clock.time("plan"):
        prepared = choose_embeddings(request, prepared, profile, unquantized)
        plans = solve_plans(context, request, profile, prepared)
    yield (state := replace(state, stage="plan", plans=plans))

    checkpoints = {}
    for name, plan in plans.by_name.items():
        label = f"quantize: {name}"
        with clock.time(label):
            checkpoints[name] = make_checkpoint(context, plan, windows.quantizing, label)
    yield (state := replace(state, stage="quantize", checkpoints=checkpoints))

    with clock.time("guard"):
        selection = select_plan(context, request, profile, plans, checkpoints, windows.selection)
    chosen, options = selection.delivered, TrainingRequest.for_run(request, windows.selection)
    training = training_task(context, plans.by_name[chosen], checkpoints[chosen], options)
    trained = train_and_compare(context, training, selection.delivered_quality, clock)
    delivery = Delivery(context.model.path, selection, checkpoints, trained)
    yield (state := replace(state, stage="tune", delivery=delivery))

    with clock.time("evaluate"):
        quality = evaluate(context, delivery.evaluated, windows.evaluation)
    check = CheckTask.for_run(request, profiling, prepared.budget_bytes, windows.selection)
    checks = check_random_plans(context, check, profile)
    results = RunResults(prepared, profile, plans, delivery, training, quality, checks)
    report = build_report(context, request, results, clock.seconds)
    yield replace(state, stage="evaluate", report=report)


def run(
    request: RunRequest, store: StageStore, reporter: Reporter, given: Profile | None = None
) -> tuple[Report, Delivery]:
    """Run all stages; return the report and what is delivered. See `walk`."""
    (state,) = deque(walk(request, store, reporter, given), maxlen=1)
    if state.report is None or state.delivery is None:
        raise RuntimeError("the last stage made no report")
    return state.report, state.delivery
