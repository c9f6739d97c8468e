"""Promises of quantizer.rounding.columns: scores of columns, and their order."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantizer.plans.fidelity import Fidelity
from quantizer.rounding.columns import (
    column_impact,
    column_order,
    knee,
    random_impact,
    sparsity_impact,
)
from quantizer.rounding.grids import round_to_nearest
from quantizer.rounding.inverse import DAMPING
from tests.support.quantized import correlated_inputs, fidelities, fixed, normal

scores = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=150)
"""(impact, moment) of each column, with many ties."""


def _order_slowly(impact: list[int], moments: list[int], high: int) -> list[int]:
    """Return the column order by sorting columns in plain Python."""
    columns = range(len(impact))
    chosen = set(sorted(columns, key=lambda column: (-impact[column], column))[:high])
    return sorted(columns, key=lambda column: (column not in chosen, -moments[column], column))


@fixed
@given(fidelities(), scores)
def test_column_order_is_by_part_then_moment_with_ties_in_place(
    fidelity: Fidelity, columns: list[tuple[int, int]]
) -> None:
    impact, moments = ([row[side] for row in columns] for side in (0, 1))
    order = column_order(torch.tensor(impact).float(), torch.tensor(moments).float(), fidelity)
    assert order.dtype == torch.int64
    assert order.tolist() == _order_slowly(impact, moments, fidelity.high_columns(len(columns)))


@fixed
@given(fidelities(), scores)
def test_column_order_is_a_permutation_with_the_highest_impacts_in_front(
    fidelity: Fidelity, columns: list[tuple[int, int]]
) -> None:
    impact, moments = (torch.tensor([row[side] for row in columns]).float() for side in (0, 1))
    order = column_order(impact, moments, fidelity)
    assert sorted(order.tolist()) == list(range(len(columns)))
    high = fidelity.high_columns(len(columns))
    if high:
        assert impact[order[:high]].min() >= impact[order[high:]].max()


def test_equal_scores_keep_the_columns_own_order() -> None:
    assert column_order(torch.ones(100), torch.ones(100), Fidelity(2, 4, 0.5, 32)).tolist() == list(
        range(100)
    )


@pytest.mark.parametrize(("bits", "columns"), [(2, 64), (3, 33), (4, 100)])
def test_column_impact_is_the_moment_times_the_rounding_error(bits: int, columns: int) -> None:
    weight, inputs = normal(7, columns), normal(300, columns, seed=1)
    hessian = inputs.t() @ inputs
    impact = column_impact(weight, hessian, bits, 32)
    rounded = round_to_nearest(weight, bits, 32, hessian.diagonal())
    for column in range(columns):
        moment = sum(float(value) ** 2 for value in inputs[:, column].double())
        error = sum(float(value) ** 2 for value in (rounded - weight)[:, column].double())
        assert float(impact[column]) == pytest.approx(moment * error, rel=1e-4)


def test_columns_that_no_input_reaches_have_no_impact() -> None:
    moments = torch.ones(64)
    moments[5] = 0
    impact = column_impact(normal(7, 64), moments.diag(), 2, 32)
    assert int((impact == 0).sum()) == 1
    assert float(impact[5]) == 0


def test_the_column_that_matters_most_gets_the_high_width() -> None:
    weight, hessian = normal(7, 128), torch.eye(128)
    hessian[77, 77] = 1000
    impact = column_impact(weight, hessian, 2, 32)
    assert int(impact.argmax()) == 77
    assert column_order(impact, hessian.diagonal(), Fidelity(2, 8, 0.25, 32))[0] == 77


def test_sparsity_impact_is_the_squared_weight_over_the_squared_inverse_diagonal() -> None:
    inputs = correlated_inputs(200, 40).double()
    weight, hessian = normal(12, 40, seed=2), inputs.t() @ inputs / 200
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(40, dtype=torch.float64)
    expected = weight.double().square().sum(0) / torch.linalg.inv(damped).diagonal().square()
    assert sparsity_impact(weight, hessian.float()).double().allclose(expected, rtol=1e-2)
    assert sparsity_impact(weight, torch.zeros(40, 40)).equal(weight.square().sum(0))


def test_random_impact_is_the_same_every_time_and_another_for_another_width() -> None:
    assert random_impact(64).equal(random_impact(64))
    assert not random_impact(65)[:64].equal(random_impact(64))


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([9.0] * 3 + [1.0] * 7, 3),
        ([1.0] * 7 + [9.0] * 3, 3),
        ([5.0] * 10, 10),
        ([0.0] * 4, 4),
        ([1.0], 1),
        ([100.0, 0.0, 0.0], 1),
    ],
    ids=str,
)
def test_knee_is_where_scores_fall_below_average(scores: list[float], expected: int) -> None:
    assert knee(torch.tensor(scores)) == expected
