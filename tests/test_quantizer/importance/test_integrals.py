"""Promises of quantizer.importance.integrals.

Integrals add up to the loss, and the model is left as it was.
"""

import pytest
import torch

from quantizer.importance.integrals import weight_integrals
from quantizer.running.runner import BlockRunner
from tests.support.quantized import TinyModel, logits_of
from tests.support.trained import WINDOWS, rounded_to_tenths


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_integrals_of_all_weights_add_up_to_the_loss(
    tiny_model: TinyModel, precision: torch.dtype
) -> None:
    model = tiny_model("llama")
    originals, quantized = rounded_to_tenths(model)
    found = weight_integrals(BlockRunner(model, precision), originals, quantized, WINDOWS, nodes=4)

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
    originals, quantized = rounded_to_tenths(model)
    weight_integrals(BlockRunner(model), originals, quantized, WINDOWS[:2])
    for (_, one), (_, other) in zip(
        model.named_parameters(), fresh.named_parameters(), strict=True
    ):
        assert one.equal(other)
        assert one.requires_grad == other.requires_grad
        assert one.grad is None
