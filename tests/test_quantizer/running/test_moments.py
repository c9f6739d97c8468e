"""Promises of quantizer.running.moments: moments are means over all inputs, layers share theirs."""

import pytest
import torch

from quantizer.running.block_inputs import BlockInputs
from quantizer.running.moments import Calibration, input_groups, input_moments
from quantizer.running.runner import BlockRunner
from quantizer.structure.blocks import find_layers
from tests.support.moments import moments_by_hook
from tests.support.quantized import TinyModel, token_windows

CALIBRATION = Calibration(token_windows(5, 40), 2)


@pytest.mark.parametrize(
    ("family", "groups"),
    [
        (
            "llama",
            [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
        ),
        (
            "gemma3",
            [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
        ),
        ("opt", [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]]),
        ("gpt_neox", [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]]),
    ],
)
def test_layers_that_share_their_input_are_grouped_in_call_order(
    family: str, groups: list[list[str]], tiny_model: TinyModel
) -> None:
    runner = BlockRunner(tiny_model(family))
    members = [layer for layer in find_layers(runner.model) if layer.block == 1]
    batch = CALIBRATION.batches()[0]
    hidden = runner.run_blocks(batch, runner.initial_states(batch), 0, 1)
    found = input_groups(BlockInputs(runner, 1, [batch], [hidden]), members)
    assert [sorted(layer.kind.rpartition(".")[2] for layer in group) for group in found] == [
        sorted(group) for group in groups
    ]


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"])
def test_input_moments_are_the_mean_of_the_outer_products(
    family: str, tiny_model: TinyModel
) -> None:
    runner = BlockRunner(tiny_model(family))
    batches = CALIBRATION.batches()
    hidden = [runner.run_blocks(batch, runner.initial_states(batch), 0, 1) for batch in batches]
    for layer in (layer for layer in find_layers(runner.model) if layer.block == 1):
        moments = input_moments(BlockInputs(runner, 1, batches, hidden), layer)
        expected = moments_by_hook(runner.model, layer, CALIBRATION)
        assert torch.allclose(
            moments.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
        )
        assert not runner.model.get_submodule(layer.name)._forward_pre_hooks


def test_batches_cover_the_windows_in_order() -> None:
    assert [len(batch) for batch in CALIBRATION.batches()] == [2, 2, 1]
    assert torch.equal(torch.cat(CALIBRATION.batches()), CALIBRATION.windows)
