"""Promises of quantizer.importance.fisher: gradients are those of each window's own loss."""

import pytest
import torch

from quantizer.importance.fisher import column_information, squared_gradients
from quantizer.running.runner import BlockRunner
from quantizer.structure.blocks import find_layers
from tests.support.quantized import TinyModel
from tests.support.trained import WINDOWS


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_squared_gradients_are_those_of_whole_model_backward_passes(
    tiny_model: TinyModel, family: str
) -> None:
    model = tiny_model(family)
    layers = find_layers(model)
    found = squared_gradients(BlockRunner(model), layers, WINDOWS[:3])

    reference = tiny_model(family).requires_grad_(requires_grad=True)
    expected = {layer.name: torch.zeros(layer.out_features, layer.in_features) for layer in layers}
    for ids in WINDOWS[:3]:
        reference.zero_grad()
        log_p = reference(input_ids=ids[None], use_cache=False).logits.log_softmax(-1)
        (-log_p[0, :-1].gather(-1, ids[1:, None]).mean()).backward()
        for name in expected:
            expected[name] += reference.get_submodule(name).weight.grad.square() / 3
    assert found.keys() == expected.keys()
    for name, each in expected.items():
        assert found[name].allclose(each, rtol=1e-3, atol=1e-9)
        assert column_information(found)[name].allclose(each.sum(0), rtol=1e-3, atol=1e-9)
    assert not any(parameter.requires_grad for parameter in model.parameters()), (
        "flags are put back"
    )
    assert all(parameter.grad is None for parameter in model.parameters())
