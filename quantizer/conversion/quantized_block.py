"""The result of quantizing one decoder block, and where it is stored."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from safetensors.torch import load, save
from torch import Tensor

from quantizer.durable import PartStore
from quantizer.errors import PartMissing
from quantizer.packed.weight import QuantizedWeight
from quantizer.plans.fidelity import Fidelity
from quantizer.plans.plan import LayerSpec, by_block

_ERRORS = "errors"
_STARVED = "starved"


@dataclass(frozen=True, slots=True)
class Distortion:
    """How far a quantized layer is from the original weight W, with E = quantized - W.

    Attributes:
        output: tr(E M E') with M the mean of x x' over the calibration inputs x, times the share
            of the calibration tokens that reach the layer: the squared error of the layer's output,
            mean over all calibration tokens.
        weight: |E|^2 / |W|^2, both Frobenius norms.
    """

    output: float
    weight: float


def distortion(
    quantized: QuantizedWeight, weight: Tensor, moments: Tensor, share: float = 1.0
) -> Distortion:
    """Return the distortion of a quantized layer.

    Args:
        quantized: the quantized layer.
        weight: its original weight, [out, in].
        moments: mean of x x' over the layer's inputs, [in, in].
        share: part of the calibration tokens that reach the layer.
    """
    error = quantized.dequantize() - weight
    size = float(weight.square().sum())
    return Distortion(
        share * float(((error @ moments) * error).sum()),
        float(error.square().sum()) / size if size else 0.0,
    )


@dataclass(frozen=True, slots=True)
class QuantizedBlock:
    """The quantized candidates of a block's layers.

    Attributes:
        weights: the stored candidates, by layer name and fidelity name.
        errors: distortion of each candidate, stored or not, by layer name and fidelity name.
        starved: calibration tokens that reached a layer, by the names of layers of experts that
            fewer tokens reached than they have columns.
    """

    weights: dict[str, dict[str, QuantizedWeight]]
    errors: dict[str, dict[str, Distortion]]
    starved: dict[str, int] = field(default_factory=dict)


def write_block(parts: PartStore, index: int, block: QuantizedBlock) -> None:
    """Store block `index`."""
    tensors = {
        f"{_ERRORS}|{layer}|{fidelity}": torch.tensor(
            [error.output, error.weight], dtype=torch.float64
        )
        for layer, by_fidelity in block.errors.items()
        for fidelity, error in by_fidelity.items()
    }
    for layer, by_fidelity in block.weights.items():
        for fidelity, weight in by_fidelity.items():
            tensors |= {
                f"{layer}|{fidelity}|{name}": tensor for name, tensor in weight.tensors.items()
            }
    for layer, tokens in block.starved.items():
        tensors[f"{_STARVED}|{layer}|"] = torch.tensor(tokens)
    data = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
    parts.write(_part_name(index), data)


def find_block(
    parts: PartStore,
    layers: Sequence[LayerSpec],
    choices: Mapping[str, Sequence[Fidelity]],
    index: int,
) -> QuantizedBlock | None:
    """Return block `index` as `write_block` stored it; None if it is missing or damaged.

    Args:
        parts: where it is stored.
        layers: the layers of the block.
        choices: the candidates to return, by layer name; each must be stored.
        index: index of the block.
    """
    data = parts.read(_part_name(index))
    if data is None:
        return None
    tensors = load(data)
    weights: dict[str, dict[str, QuantizedWeight]] = {}
    for layer in layers:
        for fidelity in choices[layer.name]:
            prefix = f"{layer.name}|{fidelity.name}|"
            own = {
                key.removeprefix(prefix): tensor
                for key, tensor in tensors.items()
                if key.startswith(prefix)
            }
            weight = QuantizedWeight(fidelity, layer.out_features, layer.in_features, own)
            weights.setdefault(layer.name, {})[fidelity.name] = weight
    errors: dict[str, dict[str, Distortion]] = {layer.name: {} for layer in layers}
    starved: dict[str, int] = {}
    for key, tensor in tensors.items():
        kind, name, fidelity_name = key.split("|")
        if kind == _ERRORS and name in errors:
            errors[name][fidelity_name] = Distortion(*tensor.tolist())
        elif kind == _STARVED:
            starved[name] = int(tensor)
    return QuantizedBlock(weights, errors, starved)


def read_block(
    parts: PartStore,
    layers: Sequence[LayerSpec],
    choices: Mapping[str, Sequence[Fidelity]],
    index: int,
) -> QuantizedBlock:
    """Return block `index`, see `find_block`.

    Raises:
        PartMissing: the block is missing or damaged.
    """
    block = find_block(parts, layers, choices, index)
    if block is None:
        raise PartMissing(
            f"the quantized weights of block {index} are missing or damaged: run again, and the "
            "block is quantized anew"
        )
    return block


def read_blocks(
    parts: PartStore, layers: Sequence[LayerSpec], choices: Mapping[str, Sequence[Fidelity]]
) -> Iterator[QuantizedBlock]:
    """Yield each block that contains one of the layers, in the order of the blocks.

    Args:
        parts: where blocks are stored.
        layers: the layers.
        choices: the candidates to return, by layer name; each must be stored.

    Raises:
        PartMissing: a block is missing or damaged.
    """
    for index, members in by_block(layers).items():
        yield read_block(parts, members, choices, index)


def _part_name(index: int) -> str:
    return f"block-{index:04d}"
