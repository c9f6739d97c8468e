"""The stage that quantizes a model as a plan says, into a checkpoint that transformers loads."""

import hashlib
import json
from itertools import zip_longest
from pathlib import Path
from typing import Any

from quantizer.conversion import blocks
from quantizer.conversion.blocks import QuantizationSpec, quantize_blocks
from quantizer.conversion.checkpoint import save_checkpoint
from quantizer.conversion.embeddings import (
    find_embeddings,
    quantize_embeddings,
    set_embedding_weights,
)
from quantizer.conversion.pack import pack_model
from quantizer.conversion.quantized_block import read_blocks
from quantizer.durable import PartStore, file_sha256
from quantizer.errors import PlanError
from quantizer.models.config import CONFIG
from quantizer.models.folder import ModelFolder
from quantizer.models.loading import meta_model
from quantizer.models.side_files import remove_side_files
from quantizer.packed.weight import QuantizedWeight
from quantizer.plans.plan import Plan
from quantizer.rounding.methods import DEFAULT_ROUNDING, Rounding
from quantizer.structure.blocks import find_layers
from service.stages.context import RunContext
from service.stages.windows import Windows
from service.storage.stage_store import StageKey

_STARVED = "starved.json"


def check_plan(model: ModelFolder, plan: Plan) -> None:
    """Refuse a plan that was made for other layers than the model's.

    Raises:
        PlanError: names the first layer that differs.
    """
    bare = meta_model(model)
    tables = [table for table in find_embeddings(bare) if table in plan.embeddings]
    for planned, actual in zip_longest(plan.layers, (*find_layers(bare), *tables)):
        if planned != actual:
            raise PlanError(
                f"the plan has layer {planned}, the model {model.name!r} has {actual} in its "
                "place; make a plan for it"
            )


def make_checkpoint(
    context: RunContext,
    plan: Plan,
    windows: Windows,
    label: str,
    rounding: Rounding = DEFAULT_ROUNDING,
) -> Path:
    """Quantize the model as a plan says, or continue where this was interrupted.

    Args:
        context: gives the model and the machine.
        plan: fidelities of layers, embedding and head.
        windows: calibration windows that layers are quantized on.
        label: what the step is called while progress is shown.
        rounding: how codes are found.

    Returns:
        The folder of the checkpoint, complete and loadable.
    """
    inputs: dict[str, Any] = {
        "model": context.model.sha256,
        "calibration": windows.sha256,
        "plan": {name: fidelity.name for name, fidelity in plan.by_name.items()},
        "batch": context.batch,
        "method": blocks.METHOD,
        "machine": context.machine.inputs(),
    }
    if rounding != DEFAULT_ROUNDING:
        inputs["rounding"] = rounding.name

    def make(folder: Path, parts: PartStore) -> None:
        runner = context.load()
        calibration = context.calibration(windows)
        table_fidelities = {table.name: fidelity for table, fidelity in plan.embeddings.items()}
        tables = quantize_embeddings(runner, table_fidelities, calibration.batches())
        set_embedding_weights(runner.model, tables)
        starved = quantize_blocks(
            runner,
            plan.without_embeddings.layers,
            QuantizationSpec.for_plan(plan, rounding),
            calibration,
            parts,
            context.reporter.step(label),
        )
        pack_model(runner.model, plan, stored_weights(plan, parts) | tables)
        store_checkpoint(runner.model, context.model, plan, folder / "model")
        (folder / _STARVED).write_text(json.dumps(starved), encoding="utf-8")

    return context.store.get(StageKey("checkpoint", inputs), make) / "model"


def read_starved(checkpoint: Path) -> dict[str, int]:
    """Return the layers of experts that few calibration tokens reached, and how many did.

    Args:
        checkpoint: a folder that `make_checkpoint` returned.
    """
    file = checkpoint.parent / _STARVED
    if not file.exists():  # made before this was stored
        return {}
    starved: dict[str, int] = json.loads(file.read_text(encoding="utf-8"))
    return starved


def store_checkpoint(model: Any, source: ModelFolder, plan: Plan, folder: Path) -> None:
    """Write a packed model into the folder of a stage, without side files of the source.

    Side files are in no stage's key: they are copied from the source when the checkpoint is
    delivered.

    Args and errors are those of `quantizer.conversion.checkpoint.save_checkpoint`.
    """
    save_checkpoint(model, source, plan, folder)
    remove_side_files(folder)


def stored_weights(plan: Plan, parts: PartStore) -> dict[str, QuantizedWeight]:
    """Return the quantized weights of all layers in blocks, by name.

    They are read from the parts that `quantize_blocks` stored.
    """
    layer_plan = plan.without_embeddings
    fidelities = layer_plan.by_name
    weights: dict[str, QuantizedWeight] = {}
    choices = {name: (fidelity,) for name, fidelity in fidelities.items()}
    for block in read_blocks(parts, layer_plan.layers, choices):
        for name, candidates in block.weights.items():
            weights[name] = candidates[fidelities[name].name]
    return weights


def checkpoint_digest(folder: Path) -> str:
    """Return the SHA-256 of a checkpoint's weights and configuration, which decide its outputs."""
    files = sorted([folder / CONFIG, *folder.glob("*.safetensors")])
    lines = "\n".join(f"{file.name}:{file_sha256(file)}" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()
