"""Promises of quantizer.packed.adapter.

No matrix of the same rank leaves less error at the layer's output.
"""

import pytest
import torch
from torch import Tensor

from quantizer.packed.adapter import Adapter, adapter_weight, fit_adapter, leading_directions
from tests.support.quantized import correlated_inputs, normal

SHAPES = [(1, 7), (7, 1), (12, 40), (40, 12), (33, 33)]


def _moments(features: int, tokens: int | None = None) -> Tensor:
    inputs = correlated_inputs(tokens or 4 * features, features).double()
    return inputs.t() @ inputs / len(inputs)


def _loss(error: Tensor, hessian: Tensor) -> float:
    return float(((error.double() @ hessian.double()) * error.double()).sum())


def _unrounded(error: Tensor, hessian: Tensor, rank: int) -> Tensor:
    directions = leading_directions(error.double(), hessian, rank)
    return directions @ directions.t() @ error.double()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 12])
def test_what_remains_is_the_sum_of_the_other_squared_singular_values(
    shape: tuple[int, int], rank: int
) -> None:
    error, hessian, rank = normal(*shape), _moments(shape[1]), min(rank, *shape)
    singular = torch.linalg.svdvals(error.double() @ torch.linalg.cholesky(hessian))
    optimum = float(singular[rank:].square().sum())
    whole = float(singular.square().sum())
    assert _loss(error - _unrounded(error, hessian, rank), hessian) == pytest.approx(
        optimum, rel=1e-6, abs=1e-10 * whole
    )
    stored = adapter_weight(fit_adapter(error, hessian.float(), rank))
    assert _loss(error - stored, hessian) == pytest.approx(optimum, rel=1e-3, abs=1e-6 * whole)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_closed_form_by_the_cholesky_factor_is_the_same_matrix(shape: tuple[int, int]) -> None:
    error, hessian, rank = normal(*shape).double(), _moments(shape[1]), min(3, *shape)
    lower = torch.linalg.cholesky(hessian)
    left, singular, right = torch.linalg.svd(error @ lower, full_matrices=False)
    truncated = (left[:, :rank] * singular[:rank]) @ right[:rank]
    expected = torch.linalg.solve_triangular(lower, truncated, upper=False, left=False)
    assert torch.allclose(
        _unrounded(error, hessian, rank),
        expected,
        rtol=1e-5,
        atol=1e-5 * float(expected.abs().max()),
    )


@pytest.mark.parametrize("shape", [(12, 40), (40, 12)])
def test_fewer_inputs_than_columns_are_enough(shape: tuple[int, int]) -> None:
    error, hessian = normal(*shape), _moments(shape[1], tokens=5)
    values, vectors = torch.linalg.eigh(hessian)
    singular = torch.linalg.svdvals(error.double() @ (vectors * values.clamp(min=0).sqrt()))
    remaining = _loss(error - _unrounded(error, hessian, 2), hessian)
    assert remaining == pytest.approx(float(singular[2:].square().sum()), rel=1e-6)
    assert _loss(error - _unrounded(error, hessian, 5), hessian) < 1e-9 * _loss(error, hessian)


@pytest.mark.parametrize("shape", [(12, 40), (40, 12)])
def test_directions_are_orthonormal(shape: tuple[int, int]) -> None:
    directions = leading_directions(normal(*shape).double(), _moments(shape[1]), 6)
    assert torch.allclose(
        directions.t() @ directions, torch.eye(6, dtype=torch.float64), atol=1e-10
    )


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("factor", [1e-8, 1.0, 1e8])
def test_errors_and_moments_of_any_size_stay_within_halves(size: float, factor: float) -> None:
    error, hessian = normal(12, 40) * size, _moments(40)
    stored = adapter_weight(fit_adapter(error, (factor * hessian).float(), 4))
    assert _loss(error - stored, hessian) == pytest.approx(
        _loss(error - _unrounded(error, hessian, 4), hessian), rel=0.01
    )


def test_no_error_needs_no_adapter() -> None:
    for shape in SHAPES:
        assert not adapter_weight(
            fit_adapter(torch.zeros(shape), _moments(shape[1]).float(), 1)
        ).any()


def test_the_factors_are_multiplied_by_the_definition() -> None:
    a, b = (
        torch.tensor([[1.0, -2.0, 0.5], [0.25, 4.0, 8.0]]).half(),
        torch.tensor([[3.0, 1.0], [-1.0, 0.5]]).half(),
    )
    expected = [
        [sum(float(b[out, k]) * float(a[k, column]) for k in range(2)) for column in range(3)]
        for out in range(2)
    ]
    assert adapter_weight(Adapter(a, b)).tolist() == expected
