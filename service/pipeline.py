"""The main path: from a model and a budget to a checkpoint with its proof.

Reads top to bottom as the stages.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from allocator.answers.allocation import Allocation
from allocator.answers.uniform import likely_uniform_plans
from allocator.profile import Profile
from quantizer.plans.plan import Plan
from quantizer.running.quality import Quality
from service.report.document import Report
from service.request.request import RunRequest
from service.stages import checkpoint as checkpoint_stage
from service.stages import evaluation as evaluation_stage
from service.stages import machine as machine_stage
from service.stages import profile as profile_stage
from service.stages import windows as windows_stage
from service.stages.guard import Guard, forbidden, label_of
from service.stages.plan import plans_of
from service.stages.prepare import prepare, with_tables
from service.stages.profile import checks_of, profile_task
from service.stages.progress import Reporter
from service.stages.recipe import USUAL as USUAL_RECIPE
from service.stages.report import Comparison, build_report
from service.stages.tuning import TuneRequest, tune, tune_task
from service.storage.stage_store import StageStore

T = TypeVar("T")


@dataclass(slots=True)
class Clock:
    """Seconds spent in each stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    def time(self, stage: str, work: Callable[[], T]) -> T:
        """Return what `work` returns, and note how long it took."""
        start = time.monotonic()
        result = work()
        self.seconds[stage] = time.monotonic() - start
        return result


@dataclass(frozen=True, slots=True)
class Made:
    """What a run has made so far; it grows from stage to stage.

    Attributes:
        stage: the stage that ended, one of `service.request.stage_names.PIPELINE`.
        profile: what was measured, or given.
        allocations: the solver's plans, `plan` first.
        candidates: folders of the quantized checkpoints, by name of their plan.
        checkpoint: folder of the one that is delivered.
        trained: whether its layers were trained.
        report: the proof.
    """

    stage: str
    profile: Profile
    allocations: Mapping[str, Allocation] = field(default_factory=dict)
    candidates: Mapping[str, Path] = field(default_factory=dict)
    checkpoint: Path | None = None
    trained: bool = False
    report: Report | None = None


def run(
    request: RunRequest, store: StageStore, reporter: Reporter, given: Profile | None = None
) -> tuple[Report, Path]:
    """Do the whole job; return the report and the folder of the checkpoint. See `walk`."""
    (made,) = deque(walk(request, store, reporter, given), maxlen=1)
    if made.report is None or made.checkpoint is None:
        raise RuntimeError("the last stage made no report")
    return made.report, made.checkpoint


def walk(
    request: RunRequest, store: StageStore, reporter: Reporter, given: Profile | None = None
) -> Iterator[Made]:
    """Do the job stage by stage, and yield what was made after each of `service.request.stage_names.PIPELINE`.

    Every stage is kept under the hash of its inputs: a job that was killed goes on where it
    stopped, another budget near by uses the same profile, and walking again to a later stage only
    reads what the stages before it made.

    Args:
        request: what is wanted.
        store: where stages are kept.
        reporter: told of progress.
        given: a profile of this model; without one, it is measured.

    Raises:
        QuantizerError: model or text cannot be used.
        AllocatorError: the budget cannot be met, or the given profile is of another model.
        ServiceError: something could not be stored.
    """
    clock, machine, amounts = Clock(), machine_stage.Machine.choose(request.device), request.amounts
    task = clock.time("prepare", lambda: prepare(request, store, given))
    guard_windows = windows_stage.windows_of(store, task.model, amounts.guard)
    calibration = windows_stage.quantizing_windows(
        store, task.model, amounts.calibration, guard_windows, request.effort
    )
    held_out = windows_stage.windows_of(store, task.model, amounts.evaluation)

    profiling = profile_task(request, task, store)
    profile = given or clock.time(
        "profile", lambda: profile_stage.profile(store, profiling, reporter)
    )
    yield (made := Made("profile", profile))

    task, tables = clock.time(
        "embedding and head", lambda: with_tables(request, task, profile, store, reporter)
    )
    allocations = clock.time("plan", lambda: plans_of(profile, request, task.budget_bytes, store))
    rivals = likely_uniform_plans(profile, task.budget_bytes)[: request.effort.rivals]
    uniforms = {label_of(plan): plan for plan in rivals}
    yield (made := replace(made, stage="plan", allocations=allocations))

    def quantize(name: str, plan: Plan) -> Path:
        label, whole, batch = f"quantize: {name}", plan.with_embeddings(tables), amounts.batch
        return clock.time(
            label,
            lambda: checkpoint_stage.checkpoint(
                store, task.model, whole, calibration, batch, machine, reporter, label
            ),
        )

    def score(
        label: str,
        checkpoints: dict[str, Path],
        windows: windows_stage.Windows,
        *,
        fast: bool = True,
    ) -> dict[str, Quality]:
        def work() -> dict[str, Quality]:
            return evaluation_stage.evaluation(
                store,
                task.model,
                checkpoints,
                windows,
                amounts.batch,
                machine,
                reporter,
                label,
                fast=fast,
            )

        return clock.time(label, work)

    candidates = {name: quantize(name, allocation.plan) for name, allocation in allocations.items()}
    candidates |= {name: quantize(name, plan) for name, plan in uniforms.items()}
    yield (made := replace(made, stage="quantize", candidates=candidates))

    guard = Guard.judge(
        score("guard", candidates, guard_windows), forbidden(profile, request.constraints, uniforms)
    )
    untuned = candidates[guard.delivered]
    delivered = allocations.get(guard.delivered) or allocations["plan"].replaced_by(
        uniforms[guard.delivered], profile
    )
    wanted = TuneRequest(
        USUAL_RECIPE,
        request.effort,
        amounts.calibration,
        guard_windows,
        amounts.batch,
        request.seed,
    )
    tuning = tune_task(
        store, task.model, delivered.plan.with_embeddings(tables), untuned, wanted, machine
    )
    tuned = clock.time("tune", lambda: tune(store, tuning, reporter)) if tuning.phases else untuned
    if tuning.phases:
        guard = replace(
            guard, tuned=score("guard: tuned", {"tuned": tuned}, guard_windows)["tuned"]
        )
    compared = {
        "plan": tuned if guard.keeps_tuned else untuned,
        "uniform": candidates[guard.uniform],
    }
    compared |= {"untuned": untuned} if guard.keeps_tuned else {}
    yield (
        made := replace(made, stage="tune", checkpoint=compared["plan"], trained=guard.keeps_tuned)
    )

    quality = score("evaluate", compared, held_out, fast=False)
    found = checks_of(request, task, profiling, profile, guard_windows, store, reporter)
    comparison = Comparison(
        profile, delivered, uniforms[guard.uniform], tables, guard, tuning, quality, found
    )
    report = build_report(
        request, task.model, task.sizes, comparison, compared["plan"], clock.seconds
    )
    yield replace(made, stage="evaluate", report=report)
