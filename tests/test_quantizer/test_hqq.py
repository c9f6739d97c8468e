"""Promises of quantizer.hqq: the grid of the full range, where integers leave no better one, and the documented threshold."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantizer.grid import dequantize, quantize
from quantizer.hqq import NORM, fit_robust_grid, lp_error, shrink
from tests.test_quantizer.helpers import few, normal


def _error(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return lp_error(weight - dequantize(quantize(weight, scale, zero, bits), scale, zero))


def _full_range(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=2.0**-14).half().float()
    return scale, (-low / scale).round().clamp(0, 2**bits - 1)


@few
@given(st.sampled_from([2, 3, 4, 8]), st.integers(0, 1000), st.booleans())
def test_integers_leave_the_grid_of_the_full_range(bits: int, seed: int, heavy: bool) -> None:
    weight = normal(16, 64, seed=seed)
    weight = weight.sign() * weight.abs() ** 3 if heavy else weight
    scale, zero = fit_robust_grid(weight, bits)
    assert (_error(weight, scale, zero, bits) <= _error(weight, *_full_range(weight, bits), bits) * (1 + 1e-6)).all()
    assert scale.equal(_full_range(weight, bits)[0])
    assert zero.equal(_full_range(weight, bits)[1])
    assert zero.equal(zero.round())
    assert ((zero >= 0) & (zero <= 2**bits - 1)).all()


@pytest.mark.parametrize("value", [0.0, 0.05, -0.05, 0.5, -2.0])
def test_shrink_is_its_formula(value: float) -> None:
    expected = 0.0 if value == 0 else max(0.0, abs(value) - NORM / 10 * abs(value) ** (NORM - 1)) * (1 if value > 0 else -1)
    assert float(shrink(torch.tensor(value), 10.0)) == pytest.approx(expected, abs=1e-6)


def test_constant_rows_are_stored_as_well_as_a_half_can() -> None:
    weight = torch.tensor([[0.0] * 32, [0.75] * 32, [-0.75] * 32])
    scale, zero = fit_robust_grid(weight, 2)
    assert (weight - dequantize(quantize(weight, scale, zero, 2), scale, zero)).abs().max() < 1e-3
