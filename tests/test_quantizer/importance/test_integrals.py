"""Promises of quantizer.importance.integrals.

Integrals add up to the loss, and kept weights are the largest ones and those that matter.
"""

import pytest
import torch
from torch import Tensor

from quantizer.importance.integrals import (
    outlier_counts,
    select_weights,
    top_mask,
    weight_integrals,
)
from quantizer.running.runner import BlockRunner
from tests.support.quantized import TinyModel, logits_of
from tests.support.trained import WINDOWS


def _rounded(model: object) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    names = [
        f"model.layers.{block}.{kind}"
        for block in (0, 2)
        for kind in ("mlp.down_proj", "self_attn.v_proj")
    ]
    originals = {name: model.get_submodule(name).weight.data.clone() for name in names}  # type: ignore[attr-defined]
    return originals, {name: (weight / 0.1).round() * 0.1 for name, weight in originals.items()}


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_integrals_of_all_weights_add_up_to_the_loss(
    tiny_model: TinyModel, precision: torch.dtype
) -> None:
    model = tiny_model("llama")
    originals, quantized = _rounded(model)
    found = weight_integrals(
        BlockRunner(model, precision), originals, quantized, WINDOWS, nodes=4, precision=precision
    )

    reference = logits_of(model, WINDOWS).log_softmax(-1)
    for name, weight in quantized.items():
        model.get_submodule(name).weight.data = weight
    changed = logits_of(model, WINDOWS).log_softmax(-1)
    divergence = float((reference.exp() * (reference - changed)).sum(-1).mean())
    assert sum(float(each.sum()) for each in found.values()) == pytest.approx(
        divergence, rel=0.01 if precision == torch.float32 else 0.05
    )
    assert found.keys() == originals.keys()


def test_the_model_is_left_as_it_was(tiny_model: TinyModel) -> None:
    model, fresh = tiny_model("llama"), tiny_model("llama")
    originals, quantized = _rounded(model)
    weight_integrals(BlockRunner(model), originals, quantized, WINDOWS[:2])
    for (_, one), (_, other) in zip(
        model.named_parameters(), fresh.named_parameters(), strict=True
    ):
        assert one.equal(other)
        assert one.requires_grad == other.requires_grad
        assert one.grad is None


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


def test_kept_weights_are_the_largest_and_those_that_matter_most(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    originals, quantized = _rounded(model)
    share, size = 0.02, sum(weight.numel() for weight in originals.values())
    kept = select_weights(BlockRunner(model), originals, quantized, WINDOWS, share)

    counts = {name: round(kept.shares[name] * weight.numel()) for name, weight in originals.items()}
    assert sum(counts.values()) == pytest.approx(share * size, rel=0.02)
    chosen = {name: top_mask(kept.scores[name], count) for name, count in counts.items()}
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
