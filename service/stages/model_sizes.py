"""Bytes of a model by its parts, before anything is quantized."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from allocator.demands.budget import Budget
from allocator.errors import BudgetInfeasible
from quantizer.conversion.checkpoint import checkpoint_bytes
from quantizer.models.folder import ModelFolder
from quantizer.plans.plan import LayerSpec

_TENSORS_PER_LAYER = 7
_HEADER_BYTES_PER_TENSOR = 120
"""Upper bound of what a safetensors header states of a tensor besides the layer's name.

Tensor name, dtype, shape, offsets.
"""


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Bytes of a model.

    Attributes:
        file_bytes: all weight files.
        layer_bytes: weights of the layers to quantize, without biases, in the stored dtype.
        unquantized_bytes: everything else in the files: embeddings, head, norms, biases, headers.
        layer_weights: number of weights in the layers to quantize.
        vocabulary: number of tokens that the head distinguishes.
        item_bytes: bytes of one weight.
    """

    file_bytes: int
    layer_bytes: int
    unquantized_bytes: int
    layer_weights: int
    vocabulary: int
    item_bytes: int

    @property
    def other_weights(self) -> int:
        """Number of weights beside the layers to quantize; file headers count as weights."""
        return self.unquantized_bytes // self.item_bytes


def measure_sizes(model: ModelFolder, skeleton: Any, layers: Sequence[LayerSpec]) -> ModelSizes:
    """Count the bytes of a model's files, or of its parameters where there are no files yet.

    Layers count by their shapes, so names in the files need not equal those in the model.

    Args:
        model: where the files are.
        skeleton: the model without storage for its weights.
        layers: its layers.
    """
    item_bytes = int(getattr(torch, model.dtype).itemsize)
    layer_weights = sum(layer.weights for layer in layers)
    layer_bytes = layer_weights * item_bytes
    parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    file_bytes = checkpoint_bytes(model.path) or parameters * item_bytes
    return ModelSizes(
        file_bytes=file_bytes,
        layer_bytes=layer_bytes,
        unquantized_bytes=file_bytes - layer_bytes,
        layer_weights=layer_weights,
        vocabulary=skeleton.config.get_text_config().vocab_size,
        item_bytes=item_bytes,
    )


def rest_of_file(
    budget: Budget,
    file_bytes: int,
    sizes: ModelSizes,
    layers: Sequence[LayerSpec],
    tables: Sequence[LayerSpec] = (),
) -> int:
    """Return the bytes that a budget for the whole file leaves for what is quantized.

    Bytes for the file headers are set aside; they name more tensors than before.

    Args:
        budget: as the user wrote it, for messages.
        file_bytes: the budget in bytes.
        sizes: bytes of the original by parts.
        layers: the layers to quantize.
        tables: embedding and head, where they are quantized too.

    Raises:
        BudgetInfeasible: it leaves nothing.
    """
    headers = sum(
        _TENSORS_PER_LAYER * (len(layer.name) + _HEADER_BYTES_PER_TENSOR)
        for layer in (*layers, *tables)
    )
    others = sizes.unquantized_bytes - sizes.item_bytes * sum(table.weights for table in tables)
    left = file_bytes - others - headers
    if left <= 0:
        raise BudgetInfeasible(
            f"budget {budget.text} for the whole file: {others + headers} bytes of it are not "
            "quantized (embeddings, head, norms, headers), which leaves nothing for the layers; "
            "give more"
        )
    return left
