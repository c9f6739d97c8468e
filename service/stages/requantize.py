"""The stage that keeps single weights in 16 bits.

Those that the post-quantization integral ranks highest.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from quantizer.conversion import blocks
from quantizer.conversion.blocks import quantize_blocks
from quantizer.conversion.checkpoint import pack_model, read_weights, save_checkpoint
from quantizer.conversion.embeddings import set_embedding_weights
from quantizer.durable import PartStore
from quantizer.errors import PlanError
from quantizer.importance import selection
from quantizer.importance.selection import SelectedWeights, select_weights
from quantizer.models.folder import ModelFolder
from quantizer.models.loading import load_model
from quantizer.modules.linear import get_linear
from quantizer.plans.plan import Plan
from quantizer.rounding.methods import LayerScores
from quantizer.running.moments import Calibration
from service.stages import checkpoint as checkpoint_stage
from service.stages.checkpoint import checkpoint_digest, stored_weights
from service.stages.machine import Machine
from service.stages.progress import Reporter
from service.stages.recipe import Recipe
from service.stages.windows import Windows
from service.storage.stage_store import StageKey, StageStore

RANKING_WINDOWS = 8
"""Calibration windows that weights are ranked on."""


@dataclass(frozen=True, slots=True)
class RequantTask:
    """All that decides a checkpoint whose most important weights stay in 16 bits.

    Attributes:
        model: the original.
        checkpoint: folder of the plan's checkpoint without outliers, against which weights are
            ranked.
        plan: a plan with outliers; how many weights stay in all is what counts, not how they are
            spread over layers.
        calibration: windows that layers are quantized on.
        batch: windows that are run at once.
        machine: where.
    """

    model: ModelFolder
    checkpoint: Path
    plan: Plan
    calibration: Windows
    batch: int
    machine: Machine

    @property
    def bare(self) -> Plan:
        """The plan of the checkpoint without outliers."""
        return Plan.loads((self.checkpoint / "plan.json").read_text(encoding="utf-8"))

    @property
    def share(self) -> float:
        """Share of all weights that stay."""
        pairs = list(
            zip(
                self.plan.without_embeddings.layers,
                self.plan.without_embeddings.fidelities,
                strict=True,
            )
        )
        kept = sum(
            fidelity.outlier_count(layer.out_features, layer.in_features)
            for layer, fidelity in pairs
        )
        return kept / sum(layer.weights for layer, _ in pairs)

    @property
    def key(self) -> StageKey:
        """What the checkpoint is kept under."""
        inputs = {
            "model": self.model.sha256,
            "checkpoint": checkpoint_digest(self.checkpoint),
            "share": self.share,
            "calibration": self.calibration.sha256,
            "ranking": RANKING_WINDOWS,
            "batch": self.batch,
            "method": [blocks.METHOD, selection.METHOD],
            "machine": self.machine.inputs(),
        }
        return StageKey("requantized", inputs)


def quantize_by(
    recipe: Recipe,
    store: StageStore,
    model: ModelFolder,
    plan: Plan,
    calibration: Windows,
    batch: int,
    machine: Machine,
    reporter: Reporter,
    label: str,
) -> tuple[Plan, Path]:
    """Quantize the model by a recipe, and return the plan that was carried out and the folder of the checkpoint.

    Only a recipe that ranks single weights changes the plan: it spreads the same number of outliers
    over layers anew.

    Raises:
        PlanError: weights are to be ranked, and the plan keeps none.
    """

    def plain(chosen: Plan) -> Path:
        return checkpoint_stage.checkpoint(
            store, model, chosen, calibration, batch, machine, reporter, label, recipe.rounding
        )

    if not recipe.requantized:
        return plan, plain(plan)
    if not any(fidelity.outlier_share for fidelity in plan.fidelities):
        raise PlanError(
            f"recipe {recipe.name!r} chooses outliers, the plan has none: give fidelities such as "
            "int2+3r0.1g64o0.005"
        )
    bare = Plan(
        plan.layers, tuple(replace(fidelity, outlier_share=0.0) for fidelity in plan.fidelities)
    )
    folder = requantize(
        store, RequantTask(model, plain(bare), plan, calibration, batch, machine), reporter
    )
    return Plan.loads((folder / "plan.json").read_text(encoding="utf-8")), folder


def requantize(store: StageStore, task: RequantTask, reporter: Reporter) -> Path:
    """Rank the weights of a quantized model, keep the highest and quantize the rest anew around them.

    Returns:
        the folder of the checkpoint; its plan.json says each layer's share.
    """

    def make(folder: Path, parts: PartStore) -> None:
        kept = _rank(task, reporter)
        layers, stored = task.plan.without_embeddings, read_weights(task.checkpoint, task.bare)
        spread = Plan(
            layers.layers, tuple(kept.fidelity(name, base) for name, base in layers.by_name.items())
        )
        plan, forms = (
            spread.with_embeddings(task.plan.embeddings),
            {table.name: stored[table.name] for table in task.plan.embeddings},
        )
        loaded = load_model(task.model, task.machine.dtype, task.machine.device)
        choices = {name: (fidelity,) for name, fidelity in plan.by_name.items()}
        scores = {name: LayerScores(weights=each) for name, each in kept.scores.items()}
        calibration = Calibration(task.calibration.tokens.to(task.machine.device), task.batch)
        set_embedding_weights(loaded, forms)
        quantize_blocks(
            task.machine.runner(loaded),
            spread.layers,
            choices,
            calibration,
            parts,
            reporter.step("requantize"),
            scores=scores,
        )
        pack_model(loaded, plan, stored_weights(plan, parts) | forms)
        save_checkpoint(loaded, task.model, plan, folder / "model")

    return store.get(task.key, make) / "model"


def _rank(task: RequantTask, reporter: Reporter) -> SelectedWeights:
    device, told = task.machine.device, reporter.step("rank weights")
    loaded = load_model(task.model, task.machine.dtype, device)
    originals = {
        layer.name: get_linear(loaded, layer.name).weight.data.clone()
        for layer in task.plan.without_embeddings.layers
    }
    forms = read_weights(task.checkpoint, task.bare)
    quantized = {
        name: forms[name].to(device).dequantize(weight.dtype) for name, weight in originals.items()
    }
    windows = task.calibration.tokens[:RANKING_WINDOWS].to(device)
    kept = select_weights(
        task.machine.runner(loaded),
        originals,
        quantized,
        windows,
        task.share,
    )
    told(1, 1)
    return kept
