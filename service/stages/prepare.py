"""The stage that fixes everything before any weight is read: layers, sizes, budget, menu."""

from contextlib import suppress
from dataclasses import dataclass

from allocator.answers.feasibility import check_feasible
from allocator.demands.budget import CHECKPOINT
from allocator.demands.menu import check_budget, choose_menu
from allocator.errors import BudgetInfeasible, ProfileError
from allocator.profile import Profile
from allocator.signals import find_signal
from quantizer.conversion.embeddings import find_embeddings
from quantizer.models.loading import meta_model
from quantizer.plans.plan import LayerSpec
from quantizer.structure.blocks import find_layers
from quantizer.structure.coverage import Coverage, measure_coverage
from service.request.request import AUTO, KEEP, RunRequest
from service.stages.context import RunContext
from service.stages.embedding_options import likely_bytes
from service.stages.model_sizes import ModelSizes, measure_sizes
from service.stages.prepared_run import PreparedRun
from service.stages.unquantized import rest_of_file


@dataclass(frozen=True, slots=True)
class _Structure:
    """What of a model can be quantized, and its sizes."""

    layers: tuple[LayerSpec, ...]
    tables: tuple[LayerSpec, ...]
    sizes: ModelSizes
    coverage: Coverage


def prepare(context: RunContext, request: RunRequest, given: Profile | None = None) -> PreparedRun:
    """Find the model's layers, and fix the budget and the menu of fidelities.

    Args:
        context: gives the model.
        request: gives budget, constraints and method.
        given: a profile of this model, where none is to be measured.

    Raises:
        ProfileError: the given profile was measured on another model.
        BudgetInfeasible: the budget is below the smallest plan.
        RuleError, LimitInfeasible: the constraints cannot be understood, or not be met.
        BudgetNotNeeded: the model fits the budget without quantization.
    """
    skeleton = meta_model(context.model)
    layers = find_layers(skeleton)
    sizes = measure_sizes(context.model, skeleton, layers)
    if given is not None:
        _check_profile(given, context, layers)
    may_quantize_tables = request.budget_of == CHECKPOINT and request.embeddings != KEEP
    tables = find_embeddings(skeleton) if may_quantize_tables else ()
    structure = _Structure(layers, tables, sizes, measure_coverage(skeleton))
    *earlier, last = _table_attempts(request, tables)
    for joining, table_bytes in earlier:
        with suppress(BudgetInfeasible):
            return _prepare_with(request, structure, joining, table_bytes, given)
    return _prepare_with(request, structure, *last, given)


def _check_profile(given: Profile, context: RunContext, layers: tuple[LayerSpec, ...]) -> None:
    model = context.model
    known = (model.sha256, model.earlier_sha256)
    other_weights = bool(model.sha256) and given.model_sha256 not in known
    if given.layers != layers or other_weights:
        raise ProfileError(
            f"the given profile was measured on another model than {model.name!r}; measure this one"
        )


def _table_attempts(
    request: RunRequest, tables: tuple[LayerSpec, ...]
) -> list[tuple[tuple[LayerSpec, ...], int]]:
    """Return ways to treat embedding and head, in the order in which they are tried.

    Each is a pair: the tables that are quantized, and the bytes that they are expected to take.
    """
    attempts: list[tuple[tuple[LayerSpec, ...], int]] = []
    if not tables or request.embeddings == AUTO:
        attempts.append(((), 0))
    if tables:
        attempts += [(tables, expected) for expected in likely_bytes(tables)]
    return attempts


def _prepare_with(
    request: RunRequest,
    structure: _Structure,
    tables: tuple[LayerSpec, ...],
    table_bytes: int,
    given: Profile | None,
) -> PreparedRun:
    """Fix budget and menu, with tables that are quantized and expected to take `table_bytes`.

    Raises as `prepare` does.
    """
    layers, sizes = structure.layers, structure.sizes
    shared_bytes = request.budget.weight_bytes(layers)
    if request.budget_of == CHECKPOINT:
        shared_bytes = rest_of_file(request.budget, shared_bytes, sizes, layers, tables)
    budget_bytes = shared_bytes - table_bytes
    if budget_bytes <= 0:
        raise BudgetInfeasible(
            f"budget {request.budget.text} for the whole checkpoint leaves {shared_bytes} bytes "
            "for "
            f"the layers, embedding and head, which take {table_bytes} bytes alone; give more"
        )
    check_budget(layers, budget_bytes, sizes.layer_bytes)
    reach = find_signal(request.method.signal).reach.largest_plan
    menu = choose_menu(layers, budget_bytes, request.group_size, reach)
    fidelities = menu.fidelities if given is None else given.fidelities
    check_feasible(layers, fidelities, budget_bytes, request.constraints)
    return PreparedRun(layers, sizes, structure.coverage, budget_bytes, menu, tables, shared_bytes)
