"""Promises of quantizer.importance.selection: the weights that stay are those that matter."""

import pytest
import torch

from quantizer.importance.integrals import weight_integrals
from quantizer.importance.selection import outlier_counts, select_weights, top_mask
from quantizer.running.runner import BlockRunner
from tests.support.quantized import TinyModel
from tests.support.trained import WINDOWS, rounded_to_tenths


def test_layers_get_outliers_in_proportion_to_their_mean_integral() -> None:
    integrals = {
        "a": torch.full((100, 100), 3.0),
        "b": torch.full((200, 100), 1.0),
        "c": torch.zeros(100, 100),
    }
    counts = outlier_counts(integrals, 0.01)
    assert counts == {"a": 240, "b": 160, "c": 0}
    assert outlier_counts({"a": torch.zeros(10, 10)}, 0.01) == {"a": 0}
    assert outlier_counts({"a": torch.ones(100, 100), "b": torch.zeros(900, 100)}, 0.05) == {
        "a": 450,
        "b": 0,
    }
    assert outlier_counts({"a": torch.full((100, 100), 9.0), "b": torch.ones(900, 100)}, 0.01) == {
        "a": 450,
        "b": 550,
    }


def test_selected_weights_are_the_largest_and_those_that_matter_most(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    originals, quantized = rounded_to_tenths(model)
    share, size = 0.02, sum(weight.numel() for weight in originals.values())
    selected = select_weights(BlockRunner(model), originals, quantized, WINDOWS, share)

    counts = {
        name: round(selected.shares[name] * weight.numel()) for name, weight in originals.items()
    }
    assert sum(counts.values()) == pytest.approx(share * size, rel=0.02)
    chosen = {name: top_mask(selected.scores[name], count) for name, count in counts.items()}
    first = {
        name: each.abs()
        for name, each in weight_integrals(
            BlockRunner(model), originals, quantized, WINDOWS
        ).items()
    }
    for name, count in outlier_counts(first, share / 2).items():
        assert (chosen[name] | ~top_mask(originals[name].abs(), count)).all(), (
            "the largest weights of a layer are among its outliers"
        )
    inside = sum(float(first[name][mask].sum()) for name, mask in chosen.items())
    everything = sum(float(each.sum()) for each in first.values())
    assert inside > 3 * share * everything
