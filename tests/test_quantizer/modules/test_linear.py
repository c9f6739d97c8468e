"""Promises of quantizer.modules.linear.

The packed layer computes what its weight stands for, in the place of the original.
"""

import pytest
import torch
from torch import nn

from quantizer.errors import PlanError
from quantizer.modules.linear import QuantizedLinear, get_linear, pack_layers, replace_linear
from quantizer.plans.fidelity import Fidelity
from tests.support.quantized import normal, random_weight

FIDELITY = Fidelity(2, 4, 0.3, 32)


def _linear(*, bias: bool) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(100, 7, bias=bias).requires_grad_(requires_grad=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_the_packed_layer_is_a_linear_layer_with_the_dequantized_weight(
    bias: bool, dtype: torch.dtype
) -> None:
    linear, weight = _linear(bias=bias).to(dtype), random_weight(FIDELITY, 7, 100)
    packed, inputs = QuantizedLinear.from_linear(linear, weight), normal(2, 3, 100).to(dtype)
    truth = nn.functional.linear(
        inputs.double(), weight.dequantize().double(), linear.bias.double() if bias else None
    )
    torch.testing.assert_close(
        packed(inputs).double(), truth, rtol=2 * torch.finfo(dtype).eps, atol=1e-4
    )
    assert torch.equal(packed.dequantize(dtype), weight.dequantize(dtype))


def test_the_bias_is_a_copy() -> None:
    linear = _linear(bias=True)
    packed = QuantizedLinear.from_linear(linear, random_weight(FIDELITY, 7, 100))
    before = packed.bias.clone()
    linear.bias.zero_()
    assert torch.equal(packed.bias, before)


def test_an_empty_layer_is_filled_from_a_state_dict() -> None:
    packed = QuantizedLinear.from_linear(_linear(bias=True), random_weight(FIDELITY, 7, 100))
    empty = QuantizedLinear(FIDELITY, 100, 7, bias=True, dtype=torch.float32)
    empty.load_state_dict(packed.state_dict())
    inputs = normal(5, 100)
    assert torch.equal(empty(inputs), packed(inputs))


def test_the_packed_layer_has_nothing_to_train() -> None:
    packed = QuantizedLinear.from_linear(_linear(bias=True), random_weight(FIDELITY, 7, 100))
    assert not any(parameter.requires_grad for parameter in packed.parameters())


def test_gradients_pass_through_to_the_input() -> None:
    packed = QuantizedLinear.from_linear(_linear(bias=False), random_weight(FIDELITY, 7, 100))
    inputs = normal(1, 100).requires_grad_()
    packed(inputs).sum().backward()
    assert inputs.grad is not None
    assert torch.allclose(
        inputs.grad[0], packed.dequantize(torch.float32).sum(0), rtol=1e-5, atol=1e-5
    )


def test_a_printed_layer_says_its_fidelity() -> None:
    packed = QuantizedLinear.from_linear(_linear(bias=False), random_weight(FIDELITY, 7, 100))
    assert "in_features=100, out_features=7, fidelity=int2+4r0.3g32" in repr(packed)


def test_pack_layers_replaces_the_named_layers_only() -> None:
    model = nn.Sequential(nn.Sequential(_linear(bias=True)), nn.Linear(7, 7))
    pack_layers(model, {"0.0": random_weight(FIDELITY, 7, 100)})
    assert isinstance(model[0][0], QuantizedLinear)
    assert isinstance(model[1], nn.Linear)


def test_replace_linear_reaches_the_top_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    replace_linear(model, "0", nn.Identity())
    assert isinstance(model[0], nn.Identity)


@pytest.mark.parametrize("name", ["1", "0.weight", "model.layers.0", "0.0"])
def test_names_that_the_model_lacks_are_refused(name: str) -> None:
    with pytest.raises(PlanError, match="made for another model"):
        get_linear(nn.Sequential(nn.Linear(4, 4)), name)


def test_modules_that_are_no_linear_layers_are_refused() -> None:
    with pytest.raises(PlanError, match="ReLU"):
        get_linear(nn.Sequential(nn.ReLU()), "0")
