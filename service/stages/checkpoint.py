"""The stages of the main job: each takes what the stages before it made, and keeps what it makes.

calibration -> profile -> plan -> checkpoint -> evaluation -> report
"""

import hashlib
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

from quantizer.conversion import blocks
from quantizer.conversion.blocks import quantize_blocks, read_blocks
from quantizer.conversion.checkpoint import pack_model, save_checkpoint
from quantizer.conversion.embeddings import (
    find_embeddings,
    quantize_embeddings,
    set_embedding_weights,
)
from quantizer.durable import PartStore, file_sha256
from quantizer.errors import PlanError
from quantizer.models.folder import ModelFolder
from quantizer.models.loading import load_model, meta_model
from quantizer.packed.weight import QuantizedWeight
from quantizer.plans.plan import Plan
from quantizer.rounding.methods import DEFAULT_ROUNDING, Rounding
from quantizer.running.moments import Calibration
from quantizer.running.structure import find_layers
from service.stages.machine import Machine
from service.stages.progress import Reporter
from service.stages.windows import Windows
from service.storage.stage_store import StageKey, StageStore


def check_plan(model: ModelFolder, chosen: Plan) -> None:
    """Refuse a plan that was made for other layers than the model's.

    Raises:
        PlanError: names the first layer that differs.
    """
    bare = meta_model(model)
    tables = [table for table in find_embeddings(bare) if table in chosen.embeddings]
    for planned, found in zip_longest(chosen.layers, (*find_layers(bare), *tables)):
        if planned != found:
            raise PlanError(
                f"the plan has layer {planned}, the model {model.name!r} has {found} in its "
                "place; make a plan for it"
            )


def checkpoint(
    store: StageStore,
    model: ModelFolder,
    chosen: Plan,
    windows: Windows,
    batch: int,
    machine: Machine,
    reporter: Reporter,
    label: str,
    rounding: Rounding = DEFAULT_ROUNDING,
) -> Path:
    """Quantize the model as the plan says and return the folder of the checkpoint, complete and loadable."""
    inputs: dict[str, Any] = {
        "model": model.sha256,
        "calibration": windows.sha256,
        "plan": {name: fidelity.name for name, fidelity in chosen.by_name.items()},
        "batch": batch,
        "method": blocks.METHOD,
        "machine": machine.inputs(),
        "transformers": version("transformers"),
    }
    if rounding != DEFAULT_ROUNDING:
        inputs["rounding"] = rounding.name

    def make(folder: Path, parts: PartStore) -> None:
        loaded = load_model(model, machine.dtype, machine.device)
        choices = {name: (fidelity,) for name, fidelity in chosen.by_name.items()}
        calibration = Calibration(windows.tokens.to(machine.device), batch)
        told, runner = reporter.step(label), machine.runner(loaded)
        tables = quantize_embeddings(
            runner,
            {each.name: how for each, how in chosen.embeddings.items()},
            calibration.batches(),
        )
        set_embedding_weights(loaded, tables)
        quantize_blocks(
            runner,
            chosen.without_embeddings.layers,
            choices,
            calibration,
            parts,
            told,
            rounding=rounding,
        )
        pack_model(loaded, chosen, stored_weights(chosen, parts) | tables)
        save_checkpoint(loaded, model, chosen, folder / "model")

    return store.get(StageKey("checkpoint", inputs), make) / "model"


def stored_weights(chosen: Plan, parts: PartStore) -> dict[str, QuantizedWeight]:
    """Return the stored forms of all layers in blocks out of the parts that `quantize_blocks` kept, by name."""
    chosen = chosen.without_embeddings
    weights: dict[str, QuantizedWeight] = {}
    names = chosen.by_name
    choices = {name: (fidelity,) for name, fidelity in names.items()}
    for block in read_blocks(parts, chosen.layers, choices):
        weights |= {name: forms[names[name].name] for name, forms in block.weights.items()}
    return weights


def checkpoint_digest(folder: Path) -> str:
    """Return a digest of a checkpoint's weights and configuration."""
    files = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".json"))
    return hashlib.sha256(
        "\n".join(f"{file.name}:{file_sha256(file)}" for file in files).encode()
    ).hexdigest()
