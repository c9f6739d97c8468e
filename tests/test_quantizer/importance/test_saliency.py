"""Promises of quantizer.importance.saliency.

Groups are chosen by the sums of their columns' scores, and nothing else is trained.
"""

from pathlib import Path

import pytest
import torch

from quantizer.durable import PartStore
from quantizer.errors import TrainingError
from quantizer.importance.saliency import column_scores, find_salient_groups, salient_groups
from quantizer.plans.fidelity import Fidelity
from quantizer.rounding.columns import sparsity_impact
from quantizer.running.block_inputs import BlockInputs
from quantizer.running.moments import Calibration, input_moments
from quantizer.running.runner import BlockRunner
from quantizer.structure.blocks import find_layers
from quantizer.training.distill import distill
from quantizer.training.spec import TrainingSpec
from tests.support.quantized import TinyModel, random_weight
from tests.support.trained import WINDOWS, quantized, quiet

SPLIT = Fidelity(2, 4, 0.4, 32)


def test_groups_are_chosen_by_the_scores_of_their_columns() -> None:
    stored = random_weight(SPLIT, 8, 160)  # 64 high columns in 2 groups, 96 low ones in 3
    columns = stored.tensors["columns"].long()
    scores = torch.zeros(160)
    scores[columns[32:64]] = 1.0  # the second group of the high part
    scores[columns[128:160]] = 0.9  # the last of the low part
    assert [groups.tolist() for groups in salient_groups(scores, stored, "knee")] == [
        [False, True],
        [False, False, True],
    ]
    assert [groups.tolist() for groups in salient_groups(scores, stored, "top40")] == [
        [False, True],
        [False, False, True],
    ]
    assert all(groups.all() for groups in salient_groups(scores, stored, "all"))
    drawn = {
        tuple(torch.cat(salient_groups(scores, stored, "random40", seed)).tolist())
        for seed in range(20)
    }
    assert len(drawn) > 3
    assert {sum(each) for each in drawn} == {2}
    with pytest.raises(TrainingError, match="'most'"):
        salient_groups(scores, stored, "most")


def test_column_scores_are_those_of_the_original_models_inputs(tiny_model: TinyModel) -> None:
    runner, calibration = BlockRunner(tiny_model("llama")), Calibration(WINDOWS, 4)
    layers = find_layers(runner.model)
    scores = column_scores(runner, layers, calibration)
    assert scores.keys() == {layer.name for layer in layers}
    last = layers[-1]
    hidden = [
        runner.run_blocks(batch, runner.initial_states(batch), 0, last.block)
        for batch in calibration.batches()
    ]
    moments = input_moments(BlockInputs(runner, last.block, calibration.batches(), hidden), last)
    expected = sparsity_impact(runner.model.get_submodule(last.name).weight.data, moments)
    assert scores[last.name].allclose(expected, rtol=1e-4)


def test_only_scales_of_salient_groups_are_trained(tiny_model: TinyModel, tmp_path: Path) -> None:
    layers, untrained = quantized(tiny_model("llama"), PartStore(tmp_path / "q"))
    chosen = find_salient_groups(
        BlockRunner(tiny_model("llama")), layers, untrained, Calibration(WINDOWS, 4), "top40", 0
    )
    assert chosen is not None
    spec = TrainingSpec(10, batch=4, trained="scales", scale_rate=0.02, salient="top40")
    found = distill(
        BlockRunner(tiny_model("llama")),
        untrained,
        WINDOWS,
        spec,
        PartStore(tmp_path / "d"),
        quiet,
    )
    changed = 0
    for name, weight in untrained.items():
        for before, after, groups in zip(
            weight.parts(), found[name].parts(), chosen[name], strict=True
        ):
            assert after.codes.equal(before.codes)
            assert after.scale[~groups].equal(before.scale[~groups])
            changed += int((after.scale[groups] != before.scale[groups]).sum())
    assert changed > 100
    assert (
        find_salient_groups(
            BlockRunner(tiny_model("llama")), layers, untrained, Calibration(WINDOWS, 4), "all", 0
        )
        is None
    )
