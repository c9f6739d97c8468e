"""What is settled before any weight is read: model, sizes, budget, menu."""

from contextlib import suppress
from dataclasses import dataclass, replace

from allocator.answers.embeddings import choose_tables
from allocator.answers.whatif import check_feasible
from allocator.demands.menu import Menu, check_budget, choose_menu
from allocator.errors import BudgetInfeasible, ProfileError
from allocator.profile import Profile
from allocator.signals import find_signal
from quantizer.conversion.embeddings import find_embeddings
from quantizer.models.folder import ModelFolder
from quantizer.models.loading import meta_model
from quantizer.models.source import find_model
from quantizer.plans.fidelity import Fidelity
from quantizer.plans.plan import LayerSpec
from quantizer.running.structure import find_layers
from service.request.request import AUTO, KEEP, RunRequest
from service.stages import machine as machine_stage
from service.stages import windows as windows_stage
from service.stages.embeddings import TableTask, likely_bytes, ways_of
from service.stages.progress import Reporter
from service.stages.sizes import ModelSizes, measure_sizes, rest_of_file
from service.storage.stage_store import StageStore


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
    skeleton = meta_model(model)
    layers = find_layers(skeleton)
    sizes = measure_sizes(model, skeleton, layers)
    if given is not None and (
        given.layers != layers or (read_weights and given.model_sha256 != model.sha256)
    ):
        raise ProfileError(
            f"the given profile was measured on another model than {model.name!r}; measure this one"
        )
    tables = find_embeddings(skeleton) if request.whole_file and request.embeddings != KEEP else ()
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
    reach = find_signal(request.method.signal).reach.largest_plan
    menu = choose_menu(layers, budget_bytes, request.group_size, reach)
    check_feasible(
        layers,
        menu.fidelities if given is None else given.fidelities,
        budget_bytes,
        request.constraints,
    )
    return Task(model, layers, sizes, budget_bytes, menu, tables, shared_bytes)


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
        calibration=windows_stage.windows_of(store, task.model, amounts.calibration),
        probes=windows_stage.windows_of(store, task.model, amounts.probes),
        batch=amounts.batch,
        machine=machine_stage.Machine.choose(request.device),
    )
    found = choose_tables(
        profile, request.constraints, ways_of(store, measuring, reporter), task.shared_bytes
    )
    left = task.shared_bytes - sum(way.weight_bytes for way in found)
    return replace(task, budget_bytes=left), {
        way.table: way.fidelity for way in found if way.fidelity is not None
    }
