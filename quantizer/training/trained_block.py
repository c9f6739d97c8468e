"""The result of training one decoder block, and how it is stored."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors.torch import load, save

from quantizer.packed.weight import QuantizedWeight


@dataclass(frozen=True, slots=True)
class TrainedBlock:
    """Result of training one block.

    Attributes:
        weights: quantized layers by name.
        loss_before: loss of the quantized layers before training, on all windows.
        loss_after: loss of `weights`; never more than `loss_before`.
    """

    weights: dict[str, QuantizedWeight]
    loss_before: float
    loss_after: float


def encode(block: TrainedBlock) -> bytes:
    """Return the block as bytes that `decode` reads."""
    losses = torch.tensor([block.loss_before, block.loss_after], dtype=torch.float64)
    tensors = {"losses": losses}
    for layer, weight in block.weights.items():
        tensors |= {
            f"{layer}|{name}": tensor.cpu().contiguous() for name, tensor in weight.tensors.items()
        }
    data: bytes = save(tensors)
    return data


def decode(data: bytes, quantized: Mapping[str, QuantizedWeight]) -> TrainedBlock:
    """Return the block that `encode` wrote.

    Args:
        data: what `encode` returned.
        quantized: the untrained layers of the block by name; trained ones have the same tensors.
    """
    tensors = load(data)
    before, after = tensors["losses"].tolist()
    weights = {
        layer: QuantizedWeight(
            weight.fidelity,
            weight.out_features,
            weight.in_features,
            {name: tensors[f"{layer}|{name}"] for name in weight.tensors},
        )
        for layer, weight in quantized.items()
    }
    return TrainedBlock(weights, before, after)
