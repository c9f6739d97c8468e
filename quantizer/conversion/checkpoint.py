"""Write and read quantized checkpoints: folders that transformers loads."""

import errno
import json
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantizer.durable import sync_tree
from quantizer.errors import CheckpointError
from quantizer.models.folder import ModelFolder
from quantizer.packed.weight import QuantizedWeight
from quantizer.plans.plan import Plan

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def save_checkpoint(model: Any, source: ModelFolder, plan: Plan, folder: Path) -> None:
    """Write a packed model, its plan and the source's tokenizer into a new folder.

    Parameters that are not quantized are stored in the source's dtype. Every file is flushed to the
    disk.

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
    dtype = getattr(torch, source.dtype)
    folder.mkdir(parents=True)
    for parameter in model.parameters():  # packed tensors are buffers, and stay as they are
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    # with packed embeddings, the original format would store some heads under older names
    keeps_format = not plan.embeddings
    try:
        model.save_pretrained(folder, save_original_format=keeps_format)
    except SafetensorError as err:
        code = errno.ENOSPC if "os error 28" in str(err) else errno.EIO
        raise OSError(code, str(err), str(folder)) from err
    for name in _TOKENIZER_FILES:
        if (source.path / name).is_file():
            shutil.copyfile(source.path / name, folder / name)
    (folder / "plan.json").write_text(json.dumps(plan.to_json(), indent=1) + "\n", encoding="utf-8")
    sync_tree(folder)
    found = quantized_bytes(folder, plan)
    if found != plan.weight_bytes:
        raise CheckpointError(
            f"quantized tensors take {found} bytes on disk, the plan says {plan.weight_bytes}"
        )


def read_weights(folder: Path, plan: Plan) -> dict[str, QuantizedWeight]:
    """Return the quantized layers of a checkpoint by name.

    Raises:
        CheckpointError: a layer is missing, or has another fidelity than the plan says.
    """
    tensors: dict[str, dict[str, Tensor]] = {layer.name: {} for layer in plan.layers}
    for layer_name, tensor_name, tensor in _layer_tensors(folder, tensors.keys()):
        tensors[layer_name][tensor_name] = tensor
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
    """
    layer_tensors = _layer_tensors(folder, plan.by_name)
    return sum(tensor.numel() * tensor.element_size() for _, _, tensor in layer_tensors)


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
