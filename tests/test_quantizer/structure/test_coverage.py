"""Promises of quantizer.structure.coverage: what is reached and what stays, counted exactly."""

import pytest
import torch
from torch import nn

from quantizer.structure.blocks import find_blocks, find_layers
from quantizer.structure.coverage import NO_LINEAR, measure_coverage
from quantizer.structure.linear_form import to_linear_form
from tests.support.mixtures import MIXTURES, TRANSPOSED, build_mixture


@pytest.mark.parametrize("family", [*MIXTURES, *TRANSPOSED])
def test_all_weights_of_the_blocks_are_counted_once(family: str) -> None:
    model = build_mixture(family)
    path = {"gpt2": "transformer.h", "dbrx": "transformer.blocks"}.get(family, "model.layers")
    whole = sum(each.numel() for each in model.get_submodule(path).parameters())
    to_linear_form(model)
    assert find_blocks(model)[0] == path
    coverage = measure_coverage(model)
    layers = find_layers(model)
    assert coverage.block_weights == whole
    assert coverage.reached_weights == sum(layer.weights for layer in layers)
    assert sum(coverage.layers.values()) == len(layers)
    assert whole - coverage.reached_weights == sum(stay.weights for stay in coverage.stays)
    assert coverage.warning is None


def test_experts_are_one_kind_and_routers_are_named() -> None:
    model = build_mixture("mixtral")
    to_linear_form(model)
    coverage = measure_coverage(model)
    assert coverage.layers["mlp.experts.*.down_proj"] == 8
    router = next(stay for stay in coverage.stays if stay.kind == "mlp.gate.weight")
    assert (router.count, router.weights, router.reason) == (2, 2 * 4 * 64, NO_LINEAR)


def test_little_coverage_is_said_with_the_largest_part_that_stays() -> None:
    block = nn.ModuleDict({"conv": nn.Conv1d(64, 64, 3), "out": nn.Linear(64, 64, bias=False)})
    model = nn.ModuleDict({"blocks": nn.ModuleList([block])})
    warning = measure_coverage(model).warning
    assert warning == (
        "only 25% of the weights in the blocks are quantized; the largest part that stays is "
        "conv.weight (12288 weights): it is no linear layer"
    )


def test_a_weight_that_two_layers_share_is_counted_once() -> None:
    shared = nn.Linear(64, 64, bias=False)
    blocks = nn.ModuleList([nn.ModuleDict({"up": shared}), nn.ModuleDict({"up": shared})])
    coverage = measure_coverage(nn.ModuleDict({"blocks": blocks}))
    assert (coverage.block_weights, coverage.reached_weights) == (64 * 64, 0)
    assert torch.equal(shared.weight, blocks[1]["up"].weight)
