"""Promises of quantizer.conversion.quantized_block: exact distortions, and blocks found again."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantizer.conversion.quantized_block import (
    Distortion,
    QuantizedBlock,
    distortion,
    find_block,
    read_block,
    read_blocks,
    write_block,
)
from quantizer.durable import PartStore
from quantizer.errors import PartMissing
from quantizer.plans.fidelity import Fidelity
from quantizer.plans.plan import LayerSpec, by_block
from tests.support.quantized import correlated_inputs, normal, random_weight

FIDELITIES = (Fidelity.uniform(3, 32), Fidelity(2, 4, 0.4, 32))
LAYERS = (
    LayerSpec("a", 0, "a", 24, 96),
    LayerSpec("b", 0, "b", 8, 64),
    LayerSpec("c", 1, "a", 24, 96),
)
CHOICES = {layer.name: FIDELITIES for layer in LAYERS}


def _block(layers: Sequence[LayerSpec]) -> QuantizedBlock:
    weights = {
        layer.name: {
            fidelity.name: random_weight(fidelity, layer.out_features, layer.in_features)
            for fidelity in FIDELITIES
        }
        for layer in layers
    }
    errors = {layer.name: {"int2g32": Distortion(0.1, 0.2)} for layer in layers}
    return QuantizedBlock(weights, errors)


@pytest.mark.parametrize(
    "fidelity",
    [Fidelity.uniform(2, 32), Fidelity(2, 4, 0.4, 32), Fidelity.uniform(8, 64)],
    ids=lambda fidelity: fidelity.name,
)
def test_distortion_is_the_error_of_the_outputs_and_the_relative_error_of_the_weights(
    fidelity: Fidelity,
) -> None:
    inputs, weight = correlated_inputs(200, 96), normal(24, 96, seed=1)
    quantized = random_weight(fidelity, 24, 96, seed=2)
    found = distortion(quantized, weight, inputs.t() @ inputs / len(inputs))
    dense = quantized.dequantize()
    outputs = [
        float((dense.double() @ x - weight.double() @ x).square().sum()) for x in inputs.double()
    ]
    assert found.output == pytest.approx(sum(outputs) / len(outputs), rel=1e-4)
    changed = sum(
        (a - b) ** 2
        for a, b in zip(dense.flatten().tolist(), weight.flatten().tolist(), strict=True)
    )
    assert found.weight == pytest.approx(
        changed / sum(b**2 for b in weight.flatten().tolist()), rel=1e-4
    )


def test_an_exact_layer_and_a_layer_of_zeros_have_no_distortion() -> None:
    quantized = random_weight(Fidelity.uniform(4, 32), 8, 64)
    assert distortion(quantized, quantized.dequantize(), torch.eye(64)) == Distortion(0.0, 0.0)
    # there is nothing to be relative to
    assert distortion(quantized, torch.zeros(8, 64), torch.eye(64)).weight == 0


def test_a_stored_block_is_read_back(tmp_path: Path) -> None:
    block = replace(_block(LAYERS[:2]), starved={"b": 3})
    write_block(PartStore(tmp_path), 0, block)
    found = find_block(PartStore(tmp_path), LAYERS[:2], CHOICES, 0)
    assert found is not None
    assert found.errors == block.errors
    assert found.starved == {"b": 3}
    for name, candidates in block.weights.items():
        for fidelity, weight in candidates.items():
            tensors = found.weights[name][fidelity].tensors
            assert all(tensors[key].equal(tensor) for key, tensor in weight.tensors.items())


def test_a_block_that_is_not_stored_is_missing(tmp_path: Path) -> None:
    assert find_block(PartStore(tmp_path), LAYERS[:2], CHOICES, 0) is None
    with pytest.raises(PartMissing, match="block 0 are missing or damaged: run again"):
        read_block(PartStore(tmp_path), LAYERS[:2], CHOICES, 0)


def test_blocks_are_read_in_order_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    parts = PartStore(tmp_path)
    for index, members in by_block(LAYERS).items():
        write_block(parts, index, _block(members))
    (tmp_path / "block-0001.part").write_bytes(b"damaged")
    blocks = read_blocks(parts, LAYERS, CHOICES)
    assert next(blocks).errors.keys() == {"a", "b"}
    with pytest.raises(PartMissing, match="block 1"):
        next(blocks)
