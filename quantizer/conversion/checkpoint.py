"""Write a quantized model as a folder that transformers loads."""

import errno
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantizer.conversion.embeddings import pack_embeddings
from quantizer.conversion.transformers_format import BitwrightConfig, BitwrightQuantizer
from quantizer.durable import sync_tree
from quantizer.errors import CheckpointError
from quantizer.models.folder import ModelFolder
from quantizer.modules.linear import pack_layers
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


def pack_model(model: Any, plan: Plan, weights: Mapping[str, QuantizedWeight]) -> None:
    """Turn a transformers model into its packed form, in place, ready to be saved or run.

    Args:
        model: the original's class and unquantized parameters; quantized layers' weights are
            dropped.
        plan: fidelity of every quantized layer.
        weights: stored form of every layer in the plan.

    Raises:
        CheckpointError: a stored form has another fidelity than the plan says.
    """
    for name, fidelity in plan.by_name.items():
        if weights[name].fidelity != fidelity:
            raise CheckpointError(
                f"layer {name!r} is stored as {weights[name].fidelity.name}, the plan says "
                f"{fidelity.name}"
            )
    tied = pack_embeddings(model, {table.name: weights[table.name] for table in plan.embeddings})
    pack_layers(model, {name: weights[name] for name in plan.without_embeddings.by_name})
    config = BitwrightConfig(
        {name: fidelity.name for name, fidelity in plan.by_name.items()}, tied=tied
    )
    model.config.quantization_config = config
    model.hf_quantizer = BitwrightQuantizer(config)
    model.is_quantized = True


def save_checkpoint(model: Any, source: ModelFolder, plan: Plan, folder: Path) -> None:
    """Write a packed model and the source's tokenizer into `folder`, which must not exist.

    Every file is flushed.

    Parameters that are not quantized are stored in the source's dtype.

    Raises:
        CheckpointError: the quantized tensors written do not have exactly the bytes of the plan.
    """
    dtype = getattr(torch, source.dtype)
    folder.mkdir(parents=True)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(
            dtype
        )  # packed tensors are buffers, and stay as they are
    model.config.dtype = dtype
    try:
        model.save_pretrained(
            folder, save_original_format=not plan.embeddings
        )  # else some heads are stored under older names
    except SafetensorError as err:
        raise OSError(
            errno.ENOSPC if "os error 28" in str(err) else errno.EIO, str(err), str(folder)
        ) from err
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
    """Return the stored forms of a checkpoint's quantized layers, by name.

    Raises:
        CheckpointError: a layer is missing, or is stored at another fidelity than the plan says.
    """
    tensors: dict[str, dict[str, Tensor]] = {layer.name: {} for layer in plan.layers}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            for key in stored.keys():  # noqa: SIM118  not a dict
                layer, _, leaf = key.rpartition(".")
                if layer in tensors and leaf != "bias":
                    tensors[layer][leaf] = stored.get_tensor(key)
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
    total = 0
    names = plan.by_name
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  not a dict
                layer, _, leaf = key.rpartition(".")
                if layer in names and leaf != "bias":
                    tensor = tensors.get_tensor(key)
                    total += tensor.numel() * tensor.element_size()
    return total


def checkpoint_bytes(folder: Path) -> int:
    """Return the bytes of all weight files in a model folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
