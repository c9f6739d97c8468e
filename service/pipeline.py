"""The main path: from a model and a budget to a checkpoint with its proof.

Reads top to bottom as the stages.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from allocator.answers.allocation import Allocation
from allocator.answers.difference import price_plan
from allocator.answers.embeddings import choose_tables
from allocator.answers.uniform import likely_uniform_plans
from allocator.answers.whatif import WhatIf, check_feasible
from allocator.demands.constraints import Constraints
from allocator.demands.menu import Menu, check_budget, choose_menu
from allocator.errors import BudgetInfeasible, ProfileError, RuleError
from allocator.profile import Profile, reach_of
from quantizer.conversion.embeddings import find_tables
from quantizer.models.source import ModelFolder, find_model
from quantizer.plans.fidelity import SCALE_BITS, Fidelity
from quantizer.plans.plan import LayerSpec, Plan
from quantizer.running.evaluate import Quality
from quantizer.running.structure import find_layers
from service import stages
from service.checks import Check
from service.findings import Comparison, build_report
from service.guard import UNIFORM, Guard
from service.progress import Reporter
from service.recipe import USUAL as USUAL_RECIPE
from service.report import Report
from service.request import AUTO, KEEP, RunRequest
from service.sizes import ModelSizes, measure_sizes, rest_of_file
from service.store import StageStore
from service.tables import TableTask, likely_bytes, ways_of
from service.tuning import TuneRequest, tune, tune_task

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Task:
    """A request once the model's shape is known, before any weight is touched.

    Attributes:
        model: the checked model folder.
        layers: the layers to quantize.
        sizes: bytes of the model by parts.
        budget_bytes: the budget of the quantized layers.
        menu: fidelities that fit the budget.
        tables: embedding and head, where they join what is quantized.
        shared_bytes: the budget of layers and such tables together; `budget_bytes` is what likely
            tables leave of it, until they are chosen.
    """

    model: ModelFolder
    layers: tuple[LayerSpec, ...]
    sizes: ModelSizes
    budget_bytes: int
    menu: Menu
    tables: tuple[LayerSpec, ...] = ()
    shared_bytes: int = 0

    @property
    def unquantized_bytes(self) -> int:
        """Bytes of the file beside the layers; with likely tables, where they join."""
        kept = sum(table.weights for table in self.tables) * self.sizes.item_bytes
        return self.sizes.unquantized_bytes - kept + self.shared_bytes - self.budget_bytes


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


def prepare(
    request: RunRequest,
    store: StageStore,
    given: Profile | None = None,
    *,
    read_weights: bool = True,
) -> Task:
    """Find the model and settle the budget.

    Without `read_weights` nothing but headers is read, which is enough for a dry run.

    Raises:
        ModelError: the model cannot be used.
        ProfileError: the given profile is of another model.
        BudgetInfeasible: the budget is below the smallest plan.
        RuleError, LimitInfeasible: the constraints cannot be understood, or not be met.
        BudgetNotNeeded: the model fits the budget as it is.
    """
    model = find_model(request.model, store.root / "models", read_weights=read_weights)
    skeleton = stages.skeleton(model)
    layers = find_layers(skeleton)
    sizes = measure_sizes(model, skeleton, layers)
    if given is not None and (
        given.layers != layers or (read_weights and given.model_sha256 != model.sha256)
    ):
        raise ProfileError(
            f"the given profile was measured on another model than {model.name!r}; measure this one"
        )
    tables = find_tables(skeleton) if request.whole_file and request.embeddings != KEEP else ()
    attempts: list[tuple[tuple[LayerSpec, ...], int]] = (
        [((), 0)] if not tables or request.embeddings == AUTO else []
    )
    attempts += [(tables, taken) for taken in likely_bytes(tables)] if tables else []
    *others, last = attempts
    for joining, taken in others:
        with suppress(BudgetInfeasible):
            return settle(request, model, layers, sizes, joining, taken, given)
    return settle(request, model, layers, sizes, *last, given)


def settle(
    request: RunRequest,
    model: ModelFolder,
    layers: tuple[LayerSpec, ...],
    sizes: ModelSizes,
    tables: tuple[LayerSpec, ...],
    table_bytes: int,
    given: Profile | None,
) -> Task:
    """Settle budget and menu, with tables that join the layers and may take so many bytes.

    Raises as `prepare` does.
    """
    shared_bytes = request.budget.weight_bytes(layers)
    if request.whole_file:
        shared_bytes = rest_of_file(request.budget, shared_bytes, sizes, layers, tables)
    budget_bytes = shared_bytes - table_bytes
    if budget_bytes <= 0:
        raise BudgetInfeasible(
            f"budget {request.budget.text} for the whole file leaves {shared_bytes} bytes for the "
            "layers, embedding and head, "
            f"which take {table_bytes} bytes alone; give more"
        )
    check_budget(layers, budget_bytes, sizes.layer_bytes)
    menu = choose_menu(layers, budget_bytes, request.group_size, reach_of(request.method.signal))
    check_feasible(
        layers,
        menu.fidelities if given is None else given.fidelities,
        budget_bytes,
        request.constraints,
    )
    return Task(model, layers, sizes, budget_bytes, menu, tables, shared_bytes)


@dataclass(frozen=True, slots=True)
class Made:
    """What a run has made so far; it grows from stage to stage.

    Attributes:
        stage: the stage that ended, one of `service.stage_names.PIPELINE`.
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
    """Do the job stage by stage, and yield what was made after each of `service.stage_names.PIPELINE`.

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
    clock, machine, amounts = Clock(), stages.Machine.choose(request.device), request.amounts
    task = clock.time("prepare", lambda: prepare(request, store, given))
    guard_windows = stages.windows_of(store, task.model, amounts.guard)
    calibration = stages.quantizing_windows(
        store, task.model, amounts.calibration, guard_windows, request.effort
    )
    held_out = stages.windows_of(store, task.model, amounts.evaluation)

    profiling = profile_task(request, task, store)
    profile = given or clock.time("profile", lambda: stages.profile(store, profiling, reporter))
    yield (made := Made("profile", profile))

    task, tables = clock.time(
        "embedding and head", lambda: with_tables(request, task, profile, store, reporter)
    )
    allocations = clock.time("plan", lambda: plans_of(profile, request, task.budget_bytes, store))
    rivals = likely_uniform_plans(profile, task.budget_bytes)[: request.effort.rivals]
    uniforms = {label_of(plan): plan for plan in rivals}
    yield (made := replace(made, stage="plan", allocations=allocations))

    def quantize(name: str, plan: Plan) -> Path:
        label, whole, batch = f"quantize: {name}", plan.with_tables(tables), amounts.batch
        return clock.time(
            label,
            lambda: stages.checkpoint(
                store, task.model, whole, calibration, batch, machine, reporter, label
            ),
        )

    def score(
        label: str, checkpoints: dict[str, Path], windows: stages.Windows, *, fast: bool = True
    ) -> dict[str, Quality]:
        def work() -> dict[str, Quality]:
            return stages.evaluation(
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
        store, task.model, delivered.plan.with_tables(tables), untuned, wanted, machine
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


def label_of(uniform: Plan) -> str:
    """Return a name for a uniform plan.

    Its code widths, group size and, where they are not the usual ones, bits of its scales.
    """
    widest = max(uniform.fidelities, key=lambda fidelity: (fidelity.bits_hi, fidelity.ratio))
    scales = f"s{widest.scale_bits}" if widest.scale_bits < SCALE_BITS[0] else ""
    lowest = min(fidelity.bits_lo for fidelity in uniform.fidelities)
    return f"{UNIFORM} {lowest}+{widest.bits_hi} g{widest.group_size}{scales}"


def with_tables(
    request: RunRequest, task: Task, profile: Profile, store: StageStore, reporter: Reporter
) -> tuple[Task, dict[LayerSpec, Fidelity]]:
    """Return the task with the budget that the best way to store embedding and head leaves to the layers, and that way."""
    if not task.tables:
        return task, {}
    amounts = request.amounts
    measuring = TableTask(
        model=task.model,
        tables=task.tables,
        item_bytes=task.sizes.item_bytes,
        calibration=stages.windows_of(store, task.model, amounts.calibration),
        probes=stages.windows_of(store, task.model, amounts.probes),
        batch=amounts.batch,
        machine=stages.Machine.choose(request.device),
    )
    found = choose_tables(
        profile, request.constraints, ways_of(store, measuring, reporter), task.shared_bytes
    )
    left = task.shared_bytes - sum(way.weight_bytes for way in found)
    return replace(task, budget_bytes=left), {
        way.table: way.fidelity for way in found if way.fidelity is not None
    }


def profile_task(request: RunRequest, task: Task, store: StageStore) -> stages.ProfileTask:
    """Return all that decides the profile of a request."""
    amounts, machine = request.amounts, stages.Machine.choose(request.device)
    return stages.ProfileTask(
        model=task.model,
        menu=task.menu,
        calibration=stages.windows_of(store, task.model, amounts.calibration),
        probes=stages.windows_of(store, task.model, amounts.probes, amounts.probe_tokens),
        signal=request.method.signal,
        in_original=request.method.in_original,
        keep_all=amounts.check_plans > 0,
        batch=amounts.batch,
        seed=request.seed,
        machine=machine,
    )


def checks_of(
    request: RunRequest,
    task: Task,
    profiling: stages.ProfileTask,
    profile: Profile,
    windows: stages.Windows,
    store: StageStore,
    reporter: Reporter,
) -> list[Check]:
    """Return the random plans that were measured, as many as the request wants."""
    count = request.amounts.check_plans
    return (
        stages.checks(store, profiling, profile, task.budget_bytes, count, windows, reporter)
        if count
        else []
    )


def plans_of(
    profile: Profile, request: RunRequest, budget_bytes: int, store: StageStore
) -> dict[str, Allocation]:
    """Return the plan with the coupling that was asked for and, where it differs, the additive plan."""

    def solve(coupling: str) -> Allocation:
        return stages.plan(
            store, profile.with_coupling(coupling), budget_bytes, request.constraints
        )

    found, additive = {"plan": solve(request.method.coupling)}, solve("none")
    return found if additive.plan == found["plan"].plan else found | {"additive": additive}


def forbidden(profile: Profile, constraints: Constraints, uniforms: Mapping[str, Plan]) -> set[str]:
    """Return the names of the uniform plans that break the constraints, or cannot be shown to keep them."""
    whatif, found = WhatIf(profile, constraints), set()
    for name, plan in uniforms.items():
        try:
            if not price_plan(whatif, plan).sound:
                found.add(name)
        except (
            RuleError
        ):  # the table of times does not know a fidelity that only the uniform plan has
            found.add(name)
    return found
