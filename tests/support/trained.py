"""Quantized tiny models for the tests of training."""

from typing import Any

from torch import Tensor

from quantizer.conversion.blocks import QuantizationSpec, quantize_blocks
from quantizer.conversion.quantized_block import read_blocks
from quantizer.durable import PartStore
from quantizer.packed.weight import QuantizedWeight
from quantizer.plans.fidelity import Fidelity
from quantizer.plans.plan import LayerSpec
from quantizer.running.moments import Calibration
from quantizer.running.runner import BlockRunner
from quantizer.structure.blocks import find_layers
from tests.support.quantized import token_windows

WINDOWS = token_windows(8, 32, seed=3)
FIDELITIES = (Fidelity(2, 4, 0.4, 32), Fidelity.uniform(3, 64))


class Interrupted(Exception):
    """Stands for anything that interrupts a run."""


def quiet(_done: int, _count: int) -> None:
    """Ignore progress."""


def quantized(
    model: Any, parts: PartStore
) -> tuple[tuple[LayerSpec, ...], dict[str, QuantizedWeight]]:
    """Return the layers of a model, and the quantized layers at two alternating fidelities.

    The model is changed.
    """
    layers = find_layers(model)
    return layers, quantized_as(
        model, {layer.name: (FIDELITIES[index % 2],) for index, layer in enumerate(layers)}, parts
    )


def quantized_as(
    model: Any, choices: dict[str, tuple[Fidelity]], parts: PartStore
) -> dict[str, QuantizedWeight]:
    """Return a model's layers quantized at the given fidelities; the model is changed."""
    layers = find_layers(model)
    spec = QuantizationSpec(choices)
    quantize_blocks(BlockRunner(model), layers, spec, Calibration(WINDOWS, 4), parts, quiet)
    quantized_layers: dict[str, QuantizedWeight] = {}
    for block in read_blocks(parts, layers, choices):
        quantized_layers |= {
            name: next(iter(each.values())) for name, each in block.weights.items()
        }
    return quantized_layers


def same(left: dict[str, QuantizedWeight], right: dict[str, QuantizedWeight]) -> bool:
    """Return whether two sets of quantized layers are equal bit for bit."""
    return left.keys() == right.keys() and all(
        tensor.equal(right[name].tensors[key])
        for name, weight in left.items()
        for key, tensor in weight.tensors.items()
    )


def rounded_to_tenths(model: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights of four layers of a model, and the same rounded to multiples of 0.1."""
    names = [
        f"model.layers.{block}.{kind}"
        for block in (0, 2)
        for kind in ("mlp.down_proj", "self_attn.v_proj")
    ]
    originals = {name: model.get_submodule(name).weight.data.clone() for name in names}
    return originals, {name: (weight / 0.1).round() * 0.1 for name, weight in originals.items()}
