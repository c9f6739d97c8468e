"""Promises of quantizer.rounding.inverse: inverses and factors are exact."""

import pytest
import torch
from torch import Tensor

from quantizer.rounding.inverse import DAMPING, damped_inverse, upper_factor
from tests.support.quantized import correlated_inputs


def _hessian(features: int, seed: int = 0) -> Tensor:
    inputs = correlated_inputs(4 * features, features, seed)
    return inputs.t() @ inputs / len(inputs)


@pytest.mark.parametrize("features", [1, 2, 33, 100])
def test_the_upper_factor_is_one_of_the_damped_inverse_in_any_order(features: int) -> None:
    hessian = _hessian(features)
    order = torch.randperm(features, generator=torch.Generator().manual_seed(0))
    factor = upper_factor(damped_inverse(hessian), order)
    assert factor.dtype == torch.float32
    assert not torch.tril(factor, -1).any()
    ordered = hessian.double()[order][:, order]
    damped = ordered + DAMPING * ordered.diagonal().mean() * torch.eye(
        features, dtype=torch.float64
    )
    assert torch.allclose(
        factor.double().t() @ factor.double() @ damped,
        torch.eye(features, dtype=torch.float64),
        atol=1e-4,
    )


def test_more_is_damped_where_little_damping_fails() -> None:
    hessian = torch.tensor([[1.0, 1.5], [1.5, 1.0]], dtype=torch.float64)  # one eigenvalue is -0.5
    damped = hessian + 100 * DAMPING * torch.eye(2, dtype=torch.float64)
    assert torch.allclose(
        damped_inverse(hessian) @ damped, torch.eye(2, dtype=torch.float64), atol=1e-8
    )


def test_what_is_no_second_moment_is_not_inverted() -> None:
    with pytest.raises(ValueError, match="cannot be factorised"):
        damped_inverse(torch.tensor([[1.0, 1e9], [1e9, 1.0]]))


def test_an_inverse_that_float32_cannot_factorise_is_factorised_in_float64() -> None:
    inverse = torch.tensor([[1.0, 1 - 1e-12], [1 - 1e-12, 1.0]], dtype=torch.float64)
    factor = upper_factor(inverse, torch.arange(2))
    assert float(factor[1, 1]) == pytest.approx((1 - (1 - 1e-12) ** 2) ** 0.5, rel=1e-3)
