"""The stage that keeps single weights in 16 bits.

They are the weights that the post-quantization integral ranks highest, see
`quantizer.importance.selection`.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from quantizer.conversion import blocks
from quantizer.conversion.blocks import QuantizationSpec, quantize_blocks
from quantizer.conversion.checkpoint import read_weights
from quantizer.conversion.embeddings import set_embedding_weights
from quantizer.conversion.pack import pack_model
from quantizer.durable import PartStore
from quantizer.errors import PlanError
from quantizer.importance import selection
from quantizer.importance.selection import SelectedWeights, select_weights
from quantizer.modules.linear import get_linear
from quantizer.plans.plan import Plan
from quantizer.rounding.methods import LayerScores
from service.stages.checkpoint import (
    checkpoint_digest,
    make_checkpoint,
    store_checkpoint,
    stored_weights,
)
from service.stages.context import RunContext
from service.stages.recipe import Recipe
from service.stages.windows import Windows
from service.storage.stage_store import StageKey

RANKING_WINDOWS = 8
"""Calibration windows that weights are ranked on."""


@dataclass(frozen=True, slots=True)
class RequantTask:
    """Everything that decides a checkpoint whose most important weights stay in 16 bits.

    Attributes:
        checkpoint: folder of the plan's checkpoint without outliers, on which weights are ranked.
        plan: a plan with outliers. It decides how many weights stay in 16 bits in total; their
            distribution over layers is chosen here.
        calibration: windows that layers are quantized on.
    """

    checkpoint: Path
    plan: Plan
    calibration: Windows

    @property
    def bare_plan(self) -> Plan:
        """The plan of the checkpoint without outliers."""
        return Plan.loads((self.checkpoint / "plan.json").read_text(encoding="utf-8"))

    @property
    def share(self) -> float:
        """Share of all weights that stay in 16 bits."""
        plan = self.plan.without_embeddings
        kept = sum(
            fidelity.outlier_count(layer.out_features, layer.in_features)
            for layer, fidelity in zip(plan.layers, plan.fidelities, strict=True)
        )
        return kept / sum(layer.weights for layer in plan.layers)

    def key(self, context: RunContext) -> StageKey:
        """Return what the checkpoint is stored under."""
        inputs = {
            "model": context.model.sha256,
            "checkpoint": checkpoint_digest(self.checkpoint),
            "share": self.share,
            "calibration": self.calibration.sha256,
            "ranking": RANKING_WINDOWS,
            "batch": context.batch,
            "method": [blocks.METHOD, selection.METHOD],
            "machine": context.machine.inputs(),
        }
        return StageKey("requantized", inputs)


def quantize_by_recipe(
    context: RunContext, recipe: Recipe, plan: Plan, calibration: Windows, label: str
) -> tuple[Plan, Path]:
    """Quantize the model by a recipe.

    Args:
        context: gives the model and the machine.
        recipe: how.
        plan: fidelities of layers, embedding and head.
        calibration: windows that layers are quantized on.
        label: what the step is called while progress is shown.

    Returns:
        The plan of the checkpoint, and its folder. Only a recipe that ranks single weights changes
        the plan: it distributes the same number of outliers over layers anew.

    Raises:
        PlanError: weights are to be ranked, and the plan has no outliers.
    """
    if not recipe.requantized:
        return plan, make_checkpoint(context, plan, calibration, label, recipe.rounding)
    if not any(fidelity.outlier_share for fidelity in plan.fidelities):
        raise PlanError(
            f"recipe {recipe.name!r} chooses outliers, the plan has none: give fidelities such as "
            "int2+3r0.1g64o0.005"
        )
    without_outliers = (replace(fidelity, outlier_share=0.0) for fidelity in plan.fidelities)
    bare_plan = Plan(plan.layers, tuple(without_outliers))
    bare = make_checkpoint(context, bare_plan, calibration, label, recipe.rounding)
    folder = requantize(context, RequantTask(bare, plan, calibration))
    return Plan.loads((folder / "plan.json").read_text(encoding="utf-8")), folder


def requantize(context: RunContext, task: RequantTask) -> Path:
    """Rank the weights of a quantized model, keep the highest and quantize the others anew.

    Returns:
        The folder of the checkpoint; its plan.json states each layer's share of outliers.
    """

    def make(folder: Path, parts: PartStore) -> None:
        selected = _rank(context, task)
        layer_plan = task.plan.without_embeddings
        fidelities = tuple(
            selected.fidelity(name, each) for name, each in layer_plan.by_name.items()
        )
        spread = Plan(layer_plan.layers, fidelities)
        plan = spread.with_embeddings(task.plan.embeddings)
        stored = read_weights(task.checkpoint, task.bare_plan)
        tables = {table.name: stored[table.name] for table in task.plan.embeddings}
        runner = context.load()
        set_embedding_weights(runner.model, tables)
        scores = {name: LayerScores(weights=each) for name, each in selected.scores.items()}
        quantize_blocks(
            runner,
            spread.layers,
            QuantizationSpec.for_plan(spread, scores=scores),
            context.calibration(task.calibration),
            parts,
            context.reporter.step("requantize"),
        )
        pack_model(runner.model, plan, stored_weights(plan, parts) | tables)
        store_checkpoint(runner.model, context.model, plan, folder / "model")

    return context.store.get(task.key(context), make) / "model"


def _rank(context: RunContext, task: RequantTask) -> SelectedWeights:
    machine = context.machine
    progress = context.reporter.step("rank weights")
    runner = context.load()
    originals = {
        layer.name: get_linear(runner.model, layer.name).weight.data.clone()
        for layer in task.plan.without_embeddings.layers
    }
    stored = read_weights(task.checkpoint, task.bare_plan)
    quantized = {
        name: stored[name].to(machine.device).dequantize(weight.dtype)
        for name, weight in originals.items()
    }
    windows = task.calibration.tokens[:RANKING_WINDOWS].to(machine.device)
    selected = select_weights(runner, originals, quantized, windows, task.share)
    progress(1, 1)
    return selected
