"""Bytes of a model by its parts, before anything is quantized."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quantizer.conversion.embeddings import find_embeddings
from quantizer.models.folder import ModelFolder
from quantizer.models.stored_weights import StoredWeights, is_float
from quantizer.plans.plan import LayerSpec

OTHER = "other"
"""The part of a checkpoint that has no other name."""


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Bytes of a model.

    Attributes:
        file_bytes: all weight files that transformers loads.
        layer_bytes: weights of the layers to quantize in these files, without biases.
        unquantized_bytes: everything else, as a checkpoint stores it: embeddings, head, norms and
            biases in the main dtype, and headers.
        layer_weights: number of weights in the layers to quantize.
        vocabulary: number of tokens that the head distinguishes.
        item_bytes: bytes of one weight in the main dtype.
        part_bytes: `unquantized_bytes` by parts, see `allocator.unquantized.Unquantized`.
    """

    file_bytes: int
    layer_bytes: int
    unquantized_bytes: int
    layer_weights: int
    vocabulary: int
    item_bytes: int
    part_bytes: Mapping[str, int]

    @property
    def other_weights(self) -> int:
        """Number of weights beside the layers to quantize; file headers count as weights."""
        return self.unquantized_bytes // self.item_bytes


def measure_sizes(model: ModelFolder, skeleton: Any, layers: Sequence[LayerSpec]) -> ModelSizes:
    """Count the bytes of a model's files, or of its parameters where there are no files yet.

    What the configuration says about the dtype does not count, the tensors do.

    Args:
        model: tells what its files hold.
        skeleton: the model without storage for its weights.
        layers: its layers.
    """
    item_bytes = int(getattr(torch, model.dtype).itemsize)
    layer_weights = sum(layer.weights for layer in layers)
    parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    file_bytes = kept_bytes = parameters * item_bytes
    if model.stored is not None:
        file_bytes = model.stored.file_bytes
        kept_bytes = _saved_bytes(model.stored, skeleton, item_bytes)
    unquantized_bytes = kept_bytes - layer_weights * item_bytes
    return ModelSizes(
        file_bytes=file_bytes,
        layer_bytes=sum(_layer_bytes(model.stored, layer, item_bytes) for layer in layers),
        unquantized_bytes=unquantized_bytes,
        layer_weights=layer_weights,
        vocabulary=skeleton.config.get_text_config().vocab_size,
        item_bytes=item_bytes,
        part_bytes=_parts(skeleton, layers, item_bytes, unquantized_bytes),
    )


def _layer_bytes(stored: StoredWeights | None, layer: LayerSpec, item_bytes: int) -> int:
    """Return the bytes of a layer in the files.

    Where they call it by another name than the model does, its shape and the main dtype count.
    """
    tensor = None if stored is None else stored.tensors.get(f"{layer.name}.weight")
    if tensor is None or tensor.weights != layer.weights:
        return layer.weights * item_bytes
    return tensor.size_bytes


def _saved_bytes(stored: StoredWeights, skeleton: Any, item_bytes: int) -> int:
    """Return the bytes of the files after all floats are stored in the main dtype, as they will be.

    A tensor that is tied to another one is stored once.
    """
    repeated = _repeated_names(stored, skeleton)
    return stored.header_bytes + sum(
        tensor.weights * item_bytes if is_float(tensor) else tensor.size_bytes
        for tensor in stored.tensors.values()
        if tensor.name not in repeated
    )


def _repeated_names(stored: StoredWeights, skeleton: Any) -> set[str]:
    """Return the names in the files of parameters that are stored under another name, too."""
    first: dict[int, str] = {}
    repeated = set()
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        if name in stored.tensors and first.setdefault(id(parameter), name) != name:
            repeated.add(name)
    return repeated


def _parts(
    skeleton: Any, layers: Sequence[LayerSpec], item_bytes: int, total_bytes: int
) -> dict[str, int]:
    """Return bytes beside the layers by parts; `other` is what the named parts do not explain."""
    quantized = {f"{layer.name}.weight" for layer in layers}
    embeddings = {f"{table.name}.weight": table.kind for table in find_embeddings(skeleton)}
    parts: dict[str, int] = {}
    for name, parameter in skeleton.named_parameters():
        if name in quantized:
            continue
        part = embeddings.get(name) or _part_of(name, parameter.ndim)
        parts[part] = parts.get(part, 0) + parameter.numel() * item_bytes
    rest_bytes = total_bytes - sum(parts.values())
    if rest_bytes < 0:  # the files store less than the module holds
        return {OTHER: total_bytes}
    return {**parts, OTHER: parts.get(OTHER, 0) + rest_bytes}


def _part_of(name: str, dimensions: int) -> str:
    if name.endswith(".bias"):
        return "biases"
    return "norms" if dimensions == 1 else OTHER
