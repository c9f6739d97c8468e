"""Sizes of a model by its parts, before anything is quantized."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quantizer.checkpoint import checkpoint_bytes
from quantizer.plan import LayerSpec
from quantizer.source import ModelFolder


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Bytes of a model.

    Attributes:
        file_bytes: all weight files.
        layer_bytes: weights of the layers to quantize, without biases, in the stored dtype.
        unquantized_bytes: everything else in the files: embeddings, head, norms, biases, headers.
        layer_weights: number of weights in the layers to quantize.
    """

    file_bytes: int
    layer_bytes: int
    unquantized_bytes: int
    layer_weights: int


def measure_sizes(model: ModelFolder, layers: Sequence[LayerSpec]) -> ModelSizes:
    """Count the bytes of a model's files; layers count by their shapes, so names in the files need not equal those in the model."""
    weights = sum(layer.weights for layer in layers)
    total, layer_bytes = checkpoint_bytes(model.path), weights * getattr(torch, model.dtype).itemsize
    return ModelSizes(total, layer_bytes, total - layer_bytes, weights)
