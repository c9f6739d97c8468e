"""Promises of quantizer.packed.grid.

The range search finds the best of its candidates, and the grid can be stored.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantizer.kernels.path import KERNELS_VARIABLE, REFERENCE
from quantizer.packed.grid import dequantize, quantize
from quantizer.plans.fidelity import CODE_BITS
from quantizer.rounding.grids import best_grids, fit_grid, round_to_nearest
from tests.support.quantized import fixed, normal

LARGEST_HALF, SMALLEST_NORMAL_HALF = 65504.0, 2.0**-14


@pytest.fixture(autouse=True, params=["auto", REFERENCE])
def _kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All promises hold for compiled loops and for those of torch."""
    monkeypatch.setenv(KERNELS_VARIABLE, request.param)


def _candidates(row: np.ndarray, bits: int) -> list[tuple[float, float]]:
    """Return (scale, zero) for p = 1.0, 0.95 .. 0.4 by the definition, in float32 steps."""
    top = 2**bits - 1
    low, high = min(row.min(), np.float32(0)), max(row.max(), np.float32(0))
    found = []
    for step in range(13):
        shrink = 1 - 0.05 * step
        span = np.float32(high - low) * np.float32(shrink / top)
        scale = np.float32(
            np.float16(min(max(span, np.float32(SMALLEST_NORMAL_HALF)), np.float32(LARGEST_HALF)))
        )
        zero = min(max(np.rint(np.float32(low * np.float32(-shrink)) / scale), 0), top)
        found.append((float(scale), float(zero)))
    return found


def _error(row: np.ndarray, importance: np.ndarray, bits: int, scale: float, zero: float) -> float:
    """Return the weighted squared error of one row, by a plain loop in float64."""
    total = 0.0
    for weight, share in zip(row, importance, strict=True):
        code = min(
            max(np.rint(np.float32(weight / np.float32(scale)) + np.float32(zero)), 0), 2**bits - 1
        )
        total += float(share) * (scale * (float(code) - zero) - float(weight)) ** 2
    return total


def _assert_best(weight: Tensor, importance: Tensor, bits: int) -> None:
    scale, zero = fit_grid(weight, bits, importance)
    assert scale.shape == zero.shape == (len(weight), 1)
    for row, own_scale, own_zero in zip(
        weight.numpy(), scale[:, 0].tolist(), zero[:, 0].tolist(), strict=True
    ):
        candidates = _candidates(row, bits)
        assert (own_scale, own_zero) in candidates
        errors = [_error(row, importance.numpy(), bits, *candidate) for candidate in candidates]
        found = _error(row, importance.numpy(), bits, own_scale, own_zero)
        assert found <= min(errors) * (1 + 1e-4) + 1e-30


@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize("columns", [1, 5, 32, 100])
def test_fit_grid_finds_the_best_candidate_of_each_row(bits: int, columns: int) -> None:
    _assert_best(normal(6, columns, seed=bits), normal(columns, seed=1).square(), bits)


@fixed
@given(
    st.sampled_from(CODE_BITS),
    st.lists(
        st.tuples(st.floats(-100, 100, width=32), st.floats(0, 10, width=32)),
        min_size=1,
        max_size=12,
    ),
)
def test_fit_grid_finds_the_best_candidate_of_any_row(
    bits: int, columns: list[tuple[float, float]]
) -> None:
    weights, importance = zip(*columns, strict=True)
    _assert_best(torch.tensor([weights]), torch.tensor(importance), bits)


@pytest.mark.parametrize("bits", CODE_BITS)
def test_a_fitted_grid_is_never_worse_than_the_min_max_grid_and_at_two_bits_better(
    bits: int,
) -> None:
    weight, importance = normal(16, 64, seed=3), normal(64, seed=4).square()
    scale, zero = fit_grid(weight, bits, importance)
    fitted, plain = [], []
    for row, own_scale, own_zero in zip(
        weight.numpy(), scale[:, 0].tolist(), zero[:, 0].tolist(), strict=True
    ):
        fitted.append(_error(row, importance.numpy(), bits, own_scale, own_zero))
        plain.append(_error(row, importance.numpy(), bits, *_candidates(row, bits)[0]))
    assert all(mine <= other * (1 + 1e-5) for mine, other in zip(fitted, plain, strict=True))
    if bits == 2:
        assert sum(fitted) < 0.8 * sum(plain)


def test_importance_decides_which_error_counts() -> None:
    weight = torch.tensor([[0.9, 1.0, 1.1, 10.0]])
    for_small = fit_grid(weight, 2, torch.tensor([1.0, 1.0, 1.0, 0.0]))[0]
    for_large = fit_grid(weight, 2, torch.tensor([0.0, 0.0, 0.0, 1.0]))[0]
    assert for_small.item() < for_large.item()


@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e-3, 1.0, 1e3, 1e6, 1e9])
def test_scales_are_normal_halves_and_zero_points_are_codes(bits: int, size: float) -> None:
    scale, zero = fit_grid(normal(20, 32) * size, bits, torch.ones(32))
    assert torch.equal(scale.half().float(), scale)
    assert bool(((scale >= SMALLEST_NORMAL_HALF) & (scale <= LARGEST_HALF)).all())
    assert torch.equal(zero, zero.round())
    assert bool(((zero >= 0) & (zero <= 2**bits - 1)).all())


@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize("shift", [-5.0, -1.0, 0.0, 1.0, 5.0])
def test_zero_is_in_range_and_stays_zero(bits: int, shift: float) -> None:
    weight = normal(8, 33) + shift
    weight[:, 7] = 0
    scale, zero = fit_grid(weight, bits, torch.ones(33))
    assert bool((dequantize(quantize(weight, scale, zero, bits), scale, zero)[:, 7] == 0).all())


def test_rows_of_zeros_stay_zeros() -> None:
    scale, zero = fit_grid(torch.zeros(2, 32), 3, torch.ones(32))
    assert not dequantize(quantize(torch.zeros(2, 32), scale, zero, 3), scale, zero).any()


@pytest.mark.parametrize("value", [-3.0, 3.0])
def test_a_row_of_one_value_keeps_it(value: float) -> None:
    weight = torch.full((1, 32), value)
    assert torch.allclose(round_to_nearest(weight, 2, 32, torch.ones(32)), weight, rtol=1e-3)


def test_rows_are_fitted_apart() -> None:
    weight, importance = normal(5, 32), torch.ones(32)
    together = torch.stack(fit_grid(weight, 3, importance))
    apart = [torch.stack(fit_grid(weight[row : row + 1], 3, importance)) for row in range(5)]
    assert torch.equal(together, torch.cat(apart, 1))


@pytest.mark.parametrize("rows", [1, 127, 129, 300])
@pytest.mark.parametrize("strided", [False, True])
def test_the_best_of_any_grids_is_found_for_each_of_many_rows(rows: int, strided: bool) -> None:
    weight, importance = normal(rows, 40), normal(40, seed=1).square()
    if strided:
        weight = weight.t().contiguous().t()
    scales, zeros = (
        normal(7, rows, seed=2).abs()[..., None] + 0.1,
        normal(7, rows, seed=3).abs().round()[..., None],
    )
    exact, wide = weight.double(), scales.double()
    codes = (exact / wide + zeros).round().clamp(0, 7)
    errors = ((((codes - zeros) * wide - exact) ** 2) * importance).sum(2)
    assert torch.equal(best_grids(weight, 3, importance, scales, zeros)[0, :, 0], errors.argmin(0))


def test_the_first_of_equal_grids_wins() -> None:
    weight, grids = normal(3, 32), torch.ones(4, 3, 1)
    assert best_grids(weight, 2, torch.ones(32), grids, grids).flatten().tolist() == [0, 0, 0]
    scale, zero = fit_grid(weight, 2, torch.zeros(32))
    assert [(float(row), float(own)) for row, own in zip(scale, zero, strict=True)] == [
        _candidates(row, 2)[0] for row in weight.numpy()
    ]


@pytest.mark.parametrize("bits", CODE_BITS)
def test_codes_are_clipped_to_the_width(bits: int) -> None:
    codes = quantize(
        torch.tensor([[-1e6, 0.0, 1e6]]), torch.tensor([[0.5]]), torch.tensor([[1.0]]), bits
    )
    assert codes.tolist() == [[0, 1, 2**bits - 1]]


@pytest.mark.parametrize("columns", [31, 32, 33, 100])
def test_round_to_nearest_fits_each_group_alone(columns: int) -> None:
    weight, importance = normal(4, columns), normal(columns, seed=2).square()
    rounded = round_to_nearest(weight, 3, 32, importance)
    for start in range(0, columns, 32):
        group = slice(start, start + 32)
        scale, zero = fit_grid(weight[:, group], 3, importance[group])
        assert torch.equal(
            rounded[:, group], dequantize(quantize(weight[:, group], scale, zero, 3), scale, zero)
        )


def test_more_bits_round_closer() -> None:
    weight = normal(8, 128)
    errors = [
        float((round_to_nearest(weight, bits, 64, torch.ones(128)) - weight).square().sum())
        for bits in CODE_BITS
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 * errors[0]
