"""Bytes of a model by its parts, before anything is quantized."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quantizer.conversion.carried_over import divide
from quantizer.conversion.embeddings import find_embeddings
from quantizer.models.folder import ModelFolder
from quantizer.models.loading import bare_model
from quantizer.models.stored_weights import StoredWeights
from quantizer.plans.plan import LayerSpec

OTHER = "other"
"""The part of a checkpoint that has no other name."""


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Bytes of a model.

    Attributes:
        file_bytes: all weight files that transformers loads.
        layer_bytes: weights of the layers to quantize in these files, without biases.
        unquantized_bytes: everything else, as a checkpoint has it: embeddings, head, norms, biases
            and headers.
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
    file_bytes = parameters * item_bytes
    layer_bytes = layer_weights * item_bytes
    unquantized_bytes = file_bytes - layer_bytes
    if model.stored is not None:
        file_bytes = model.stored.file_bytes
        layer_bytes, unquantized_bytes = _divided_bytes(model, model.stored, layers)
    return ModelSizes(
        file_bytes=file_bytes,
        layer_bytes=layer_bytes,
        unquantized_bytes=unquantized_bytes,
        layer_weights=layer_weights,
        vocabulary=skeleton.config.get_text_config().vocab_size,
        item_bytes=item_bytes,
        part_bytes=_parts(skeleton, layers, item_bytes, unquantized_bytes),
    )


def _divided_bytes(
    model: ModelFolder, stored: StoredWeights, layers: Sequence[LayerSpec]
) -> tuple[int, int]:
    """Return the bytes of the layers in the files, and of what a checkpoint keeps beside them.

    A tensor that is tied to another one of the files is kept once.
    """
    bare = bare_model(model)
    item_bytes = int(getattr(torch, model.dtype).itemsize)
    division = divide(bare, list(stored.tensors), [layer.name for layer in layers])
    replaced = [name for name in division.replaced if not name.endswith("bias")]
    beside_bytes = item_bytes * sum(bare.get_parameter(name).numel() for name in division.beside)
    layer_bytes = sum(stored.tensors[name].size_bytes for name in replaced) - beside_bytes
    gone_bytes = sum(stored.tensors[name].size_bytes for name in (*replaced, *division.repeated))
    return layer_bytes, stored.file_bytes - gone_bytes + beside_bytes


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
