"""Promises of quantizer.running.waves: each expert's moments, all experts in one pass."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from quantizer.errors import ModelError
from quantizer.modules.linear import get_linear
from quantizer.plans.plan import LayerSpec
from quantizer.running.block_inputs import BlockInputs
from quantizer.running.moments import Calibration
from quantizer.running.runner import BlockRunner
from quantizer.running.waves import GroupMoments, measure_wave, waves
from quantizer.structure.blocks import find_layers
from quantizer.structure.linear_form import to_linear_form
from tests.support.mixtures import build_mixture
from tests.support.quantized import token_windows

CALIBRATION = Calibration(token_windows(4, 60), 2)


class Measured:
    """The waves of block 1 of a model, measured."""

    def __init__(self, family: str, spoil: Any = None) -> None:  # noqa: D107
        model = build_mixture(family)
        to_linear_form(model)
        if spoil is not None:
            spoil(model)
        self.runner = BlockRunner(model)
        self.batches = CALIBRATION.batches()
        self.hidden = [
            self.runner.run_blocks(batch, self.runner.initial_states(batch), 0, 1)
            for batch in self.batches
        ]
        self.members = [layer for layer in find_layers(model) if layer.block == 1]
        inputs = BlockInputs(self.runner, 1, self.batches, self.hidden)
        self.waves = waves(inputs, self.members)
        self.moments: list[GroupMoments] = []
        for wave in self.waves:
            self.moments += measure_wave(inputs, wave)

    def inputs(self, layer: LayerSpec) -> torch.Tensor:
        """Return all inputs of a layer, one after the other: the slow twin."""
        rows: list[torch.Tensor] = []
        linear = get_linear(self.runner.model, layer.name)
        handle = linear.register_forward_pre_hook(
            lambda _, args: rows.append(args[0].reshape(-1, layer.in_features))
        )
        for batch in self.batches:
            with torch.no_grad():
                self.runner.model(batch)
        handle.remove()
        return torch.cat(rows) if rows else torch.zeros(0, layer.in_features)


def kinds(wave: Sequence[Sequence[LayerSpec]]) -> list[list[str]]:
    return [[layer.kind.rpartition(".")[2] for layer in group] for group in wave]


def test_a_wave_holds_the_same_projections_of_all_experts() -> None:
    found = [kinds(wave) for wave in Measured("mixtral").waves]
    assert found == [
        [["q_proj", "k_proj", "v_proj"]],
        [["o_proj"]],
        [["gate_proj", "up_proj"]] * 4,
        [["down_proj"]] * 4,
    ]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text", "jetmoe"])
def test_moments_are_the_means_over_the_tokens_that_reach_a_layer(family: str) -> None:
    measured = Measured(family)
    positions = CALIBRATION.windows.numel()
    for each in measured.moments:
        rows = measured.inputs(each.group[0])
        assert each.tokens == len(rows)
        if len(rows) < each.matrix.shape[0]:
            continue
        expected = rows.t() @ rows / len(rows)
        scale = float(expected.abs().max())
        assert torch.allclose(each.matrix, expected, rtol=1e-3, atol=1e-4 * scale)
        assert each.share == pytest.approx(min(len(rows) / positions, 1))


def test_an_expert_that_saw_few_tokens_borrows_from_the_others() -> None:
    measured = Measured("mixtral", lambda model: model.model.layers[1].mlp.gate.weight.zero_())
    wave = [each for each in measured.moments if each.group[0].kind.endswith("down_proj")]
    starved = [each for each in wave if each.tokens == 0]
    assert starved  # ties are broken towards the first experts
    rows = torch.cat([measured.inputs(each.group[0]) for each in wave])
    mean = rows.t() @ rows / len(rows)
    for each in starved:
        assert torch.allclose(each.matrix, mean, rtol=1e-3, atol=1e-5)
        assert 0 < each.share <= 1 / CALIBRATION.windows.numel()


def test_inputs_that_are_not_finite_name_the_layer_and_the_block() -> None:
    def spoil(model: Any) -> None:
        model.model.layers[1].self_attn.v_proj.weight.fill_(1e38)

    with pytest.raises(ModelError, match=r"'model.layers.1.self_attn.o_proj' \(block 1\) are not"):
        Measured("mixtral", spoil)
