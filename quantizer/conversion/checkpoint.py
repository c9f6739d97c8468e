"""Write and read quantized checkpoints: folders that transformers loads."""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from quantizer.conversion.carried_over import Contents
from quantizer.conversion.shards import write_tensors
from quantizer.conversion.transformers_format import BitwrightConfig
from quantizer.durable import sync_tree
from quantizer.errors import CheckpointError
from quantizer.models.config import CONFIG, QUANTIZATION, read_config, sanitized
from quantizer.models.files import CONFIG_BYTES, read_object
from quantizer.models.folder import ModelFolder
from quantizer.models.side_files import copy_side_files
from quantizer.packed.weight import QuantizedWeight
from quantizer.plans.plan import Plan


def save_checkpoint(model: Any, source: ModelFolder, plan: Plan, folder: Path) -> None:
    """Write a packed model, its plan and the source's side files into a new folder.

    What is not quantized is copied from the source's files, under the names that it has there, also
    what the model does not use. Every file is flushed to the disk.

    Args:
        model: the packed model, see `quantizer.conversion.pack.pack_model`.
        source: the original model.
        plan: the plan of the quantized layers.
        folder: where to write; it must not exist.

    Raises:
        CheckpointError: the quantized tensors on disk do not have exactly the bytes of the plan.
        FileExistsError: the folder exists.
        OSError: the disk is full or fails.
    """
    folder.mkdir(parents=True)
    contents = Contents.of(model, source, plan)
    write_tensors(folder, contents.tensors())
    _write_json(folder / CONFIG, _config(model, source, plan, contents))
    copy_side_files(source.path, folder)
    _write_json(folder / "plan.json", plan.to_json())
    sync_tree(folder)
    found = quantized_bytes(folder, plan)
    if found != plan.weight_bytes:
        raise CheckpointError(
            f"quantized tensors take {found} bytes on disk, the plan says {plan.weight_bytes}"
        )


def _config(model: Any, source: ModelFolder, plan: Plan, contents: Contents) -> dict[str, Any]:
    """Return the checkpoint's configuration: the source's, and how its layers are quantized."""
    packed: BitwrightConfig = model.config.quantization_config
    fidelities = {contents.stored[name]: each.name for name, each in plan.by_name.items()}
    tied = {head: contents.stored[table] for head, table in packed.tied.items()}
    config = sanitized(read_config(source.path))
    if tied:  # nothing is left that transformers could tie
        config["tie_word_embeddings"] = False
    return config | {QUANTIZATION: BitwrightConfig(fidelities, tied=tied).to_dict()}


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def read_weights(folder: Path, plan: Plan) -> dict[str, QuantizedWeight]:
    """Return the quantized layers of a checkpoint by name.

    Raises:
        CheckpointError: a layer is missing, or has another fidelity than the plan says.
    """
    names = _layers_by_stored_name(folder, plan)
    tensors: dict[str, dict[str, Tensor]] = {layer.name: {} for layer in plan.layers}
    for stored_name, tensor_name, tensor in _layer_tensors(folder, names.keys()):
        tensors[names[stored_name]][tensor_name] = tensor
    pairs = zip(plan.layers, plan.fidelities, strict=True)
    return {
        layer.name: QuantizedWeight(
            fidelity, layer.out_features, layer.in_features, tensors[layer.name]
        )
        for layer, fidelity in pairs
    }


def quantized_bytes(folder: Path, plan: Plan) -> int:
    """Return the bytes of the plan's quantized tensors in a checkpoint, counted from the files.

    Biases are not counted.

    Raises:
        CheckpointError: the checkpoint was made by another plan.
    """
    layer_tensors = _layer_tensors(folder, _layers_by_stored_name(folder, plan).keys())
    return sum(tensor.numel() * tensor.element_size() for _, _, tensor in layer_tensors)


def _layers_by_stored_name(folder: Path, plan: Plan) -> dict[str, str]:
    """Return the plan's layers by their names in the checkpoint's files.

    The configuration lists them in the order of the plan.

    Raises:
        CheckpointError: it lists other fidelities.
    """
    config = read_object(folder / CONFIG, CONFIG_BYTES)
    stored: dict[str, str] = config[QUANTIZATION]["layers"]
    fidelities = [fidelity.name for fidelity in plan.by_name.values()]
    if list(stored.values()) != fidelities:
        raise CheckpointError(
            f"the checkpoint in {str(folder)!r} was made by another plan: its layers have other "
            "fidelities"
        )
    return dict(zip(stored, plan.by_name, strict=True))


def checkpoint_bytes(folder: Path) -> int:
    """Return the bytes of all weight files in a model folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _layer_tensors(folder: Path, layers: Collection[str]) -> Iterator[tuple[str, str, Tensor]]:
    """Yield (layer, name, tensor) for each stored tensor of some layers, without biases."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  not a dict
                layer, _, name = key.rpartition(".")
                if layer in layers and name != "bias":
                    yield layer, name, tensors.get_tensor(key)
