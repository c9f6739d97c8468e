"""Promises of quantizer.training.latent.

A latent layer computes what its quantized layer does, and its gradients are the documented ones.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from torch import nn

from quantizer.packed.weight import QuantizedWeight
from quantizer.plans.fidelity import Fidelity
from quantizer.rounding.gptq import gptq_layer
from quantizer.training.latent import LatentLinear
from quantizer.training.latent_part import START_RADIUS
from tests.support.quantized import correlated_inputs, few, fidelities, normal, random_weight

SPLIT = Fidelity(2, 4, 0.4, 32)


def _layer(
    fidelity: Fidelity = SPLIT, out: int = 24, features: int = 80
) -> tuple[nn.Linear, QuantizedWeight]:
    linear = nn.Linear(features, out)
    linear.weight.data = normal(out, features, seed=1)
    inputs = correlated_inputs(200, features)
    moments = inputs.t() @ inputs / 200
    return linear, gptq_layer(linear.weight.data, moments, fidelity, moments.diagonal())


@few
@given(fidelities())
def test_a_latent_layer_starts_as_its_quantized_layer(fidelity: Fidelity) -> None:
    stored = random_weight(replace(fidelity, outlier_share=0.0), 12, 100)
    linear = nn.Linear(100, 12)
    layer = LatentLinear(linear, stored)

    assert layer.weight().equal(stored.dequantize())
    again = layer.quantized()
    assert all(again.tensors[name].equal(tensor) for name, tensor in stored.tensors.items())
    inputs = normal(5, 100, seed=2)
    assert layer(inputs).equal(nn.functional.linear(inputs, stored.dequantize(), linear.bias))


@pytest.mark.parametrize("name", ["int2g32o0.05", "int2+4r0.4g32s6o0.02", "int3g64o0.01a4"])
def test_outliers_stay_and_all_else_around_them_can_move(name: str) -> None:
    linear, stored = _layer(Fidelity.parse(name))
    layer = LatentLinear(linear, stored)
    assert (layer.weight() - stored.dequantize()).abs().max() < 1e-6
    assert all(
        tensor.equal(stored.tensors[key]) for key, tensor in layer.quantized().tensors.items()
    )
    layer.weight().square().sum().backward()
    with torch.no_grad():
        for part in layer.parts:
            part.latent.add_(0.7)
            part.factor.mul_(1.3)
    moved = layer.quantized()
    assert (moved.dequantize() - layer.weight()).abs().max() < 2e-3
    for key in ("outlier_values", "outlier_columns", "outlier_starts"):
        assert moved.tensors[key].equal(stored.tensors[key])
    assert not moved.dequantize().equal(stored.dequantize())


def test_latent_codes_are_the_original_weight_as_far_as_the_stored_code_allows() -> None:
    linear, stored = _layer(Fidelity.uniform(3, 32), features=64)
    (part,) = LatentLinear(linear, stored).parts
    (codes,) = stored.parts()
    columns = stored.tensors["columns"].long()
    for row in range(4):
        for at in range(64):
            scale, zero = float(codes.scale[at // 32, row]), float(codes.zero[at // 32, row])
            exact = float(linear.weight.data[row, columns[at]]) / scale + zero
            code = float(codes.codes[row, at])
            expected = min(max(exact, code - START_RADIUS), code + START_RADIUS)
            assert float(part.latent.data[row, at // 32, at % 32]) == pytest.approx(
                expected, abs=1e-5
            )


def test_gradients_are_straight_through_for_codes_and_exact_for_scales() -> None:
    linear, stored = _layer()
    layer = LatentLinear(linear, stored)
    with torch.no_grad():
        layer.parts[1].latent[0, 0, 0] = -0.6  # off the grid by more than half a code
        layer.parts[1].latent[0, 0, 1] = 3.4
    cotangent = normal(24, 80, seed=5)
    (layer.weight() * cotangent).sum().backward()  # the gradient in the weight is `cotangent`

    start = 0
    for part, codes in zip(layer.parts, (p.codes() for p in layer.parts), strict=True):
        count = codes.codes.shape[1]
        gradient = cotangent[:, stored.tensors["columns"].long()][:, start : start + count]
        assert part.latent.grad is not None
        assert part.factor.grad is not None
        found = part.latent.grad.flatten(1)[:, :count]
        for row in (0, 1, 23):
            for group in range(part.scale.shape[1]):
                members = range(group * 32, min(group * 32 + 32, count))
                scale, zero = float(part.scale[row, group]), float(part.zero[row, group])
                by_hand = sum(
                    float(gradient[row, at]) * scale * (float(codes.codes[row, at]) - zero)
                    for at in members
                )
                assert float(part.factor.grad[row, group]) == pytest.approx(
                    by_hand, rel=1e-4, abs=1e-5
                )
                for at in members:
                    inside = (
                        -0.5
                        <= float(part.latent.data[row, group, at % 32])
                        <= 2 ** (4 if start == 0 else 2) - 0.5
                    )
                    assert float(found[row, at]) == pytest.approx(
                        float(gradient[row, at]) * scale if inside else 0.0, abs=1e-6
                    )
        start += count
    assert float(layer.parts[1].latent.grad[0, 0, 0]) == 0  # type: ignore[index]
    assert float(layer.parts[1].latent.grad[0, 0, 1]) != 0  # type: ignore[index]


def test_padding_of_a_ragged_group_is_never_trained() -> None:
    linear, stored = _layer(Fidelity.uniform(3, 64), features=80)
    layer = LatentLinear(linear, stored)
    layer.weight().square().sum().backward()
    (part,) = layer.parts
    assert part.latent.shape == (24, 2, 64)
    assert part.latent.grad is not None
    assert not part.latent.grad[:, 1, 16:].any()
    assert part.latent.grad[:, 1, :16].any()


def test_half_precision_inputs_are_multiplied_in_half_precision() -> None:
    linear, stored = _layer()
    inputs = normal(3, 80).bfloat16()
    found = LatentLinear(linear.bfloat16(), stored)(inputs)
    assert found.dtype == torch.bfloat16
    assert found.equal(nn.functional.linear(inputs, stored.dequantize(torch.bfloat16), linear.bias))


def test_codes_follow_the_scale_where_clipping_is_trained() -> None:
    linear, stored = _layer(Fidelity.uniform(3, 32), features=64)
    layer = LatentLinear(linear, stored, clipping=True)
    columns = stored.tensors["columns"].long()
    (part,), (codes,) = layer.parts, stored.parts()
    assert layer.weight().equal(stored.dequantize())
    start, zero = codes.scale.t().unsqueeze(-1), codes.zero.t().unsqueeze(-1)
    own = codes.codes.view(24, 2, 32)
    nearest = (linear.weight.data[:, columns].view(24, 2, 32) / start + zero).clamp(
        own - START_RADIUS, own + START_RADIUS
    )
    with torch.no_grad():
        part.factor.mul_(0.8)
    scale, exact = part.factor.detach() * start, (nearest - zero) / 0.8 + zero
    rounded = exact.round().clamp(0, 7)
    assert (rounded != own).any()
    assert layer.weight()[:, columns].allclose(((rounded - zero) * scale).flatten(1), atol=1e-6)
    assert layer.quantized().parts()[0].codes.equal(rounded.flatten(1))
    cotangent = normal(24, 64, seed=5)
    (layer.weight()[:, columns] * cotangent).sum().backward()
    inside = (exact >= -0.5) & (exact <= 7.5)
    step = torch.where(
        inside, rounded - exact, rounded - zero
    )  # the gradient of LSQ, in units of the scale
    expected = (cotangent.view(24, 2, 32) * step * start).sum(-1, keepdim=True)
    assert part.factor.grad is not None
    assert part.factor.grad.allclose(expected, rtol=1e-3, atol=1e-5)
    assert part.latent.grad is None
