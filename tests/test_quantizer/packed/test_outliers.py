"""Promises of quantizer.packed.outliers.

Exactly the highest scores are chosen, and what is stored comes back.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantizer.packed.outliers import (
    add_outliers,
    choose_outliers,
    compress_rows,
    output_error_scores,
    round_to_float16,
)
from tests.support.quantized import fixed, normal

SHAPES = [(1, 1), (1, 40), (7, 33), (40, 1), (12, 100)]


@fixed
@given(
    st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=8),
    st.integers(1, 24),
)
def test_the_highest_scores_are_chosen_and_of_equal_ones_the_first(
    rows: list[list[int]], count: int
) -> None:
    count = min(count, 3 * len(rows))
    places = [(row, column) for row in range(len(rows)) for column in range(3)]
    first = sorted(places, key=lambda place: (-rows[place[0]][place[1]], place))[:count]
    chosen = choose_outliers(torch.tensor(rows).float(), count)
    assert sorted(map(tuple, chosen.nonzero().tolist())) == sorted(first)


def test_scores_that_are_no_numbers_are_refused() -> None:
    scores = normal(4, 5)
    scores[2, 3] = float("nan")
    with pytest.raises(ValueError, match="not a number"):
        choose_outliers(scores, 2)


def test_the_default_score_is_the_output_error_of_a_weight_that_is_left_out() -> None:
    weight, inputs = normal(3, 5), normal(50, 5, seed=1)
    for out in range(3):
        for column in range(5):
            without = weight.clone()
            without[out, column] = 0
            lost = (inputs @ (weight - without).t()).square().sum()
            score = output_error_scores(weight, (inputs.t() @ inputs).diagonal())[out, column]
            assert float(score) == pytest.approx(float(lost), rel=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_compressed_by_the_definition(shape: tuple[int, int]) -> None:
    weight, chosen = normal(*shape), normal(*shape, seed=1) > 0.5
    outliers = compress_rows(weight, chosen)
    values, columns, starts = [], [], [0]
    for out in range(shape[0]):
        kept = [column for column in range(shape[1]) if chosen[out, column]]
        columns += kept
        values += [float(weight[out, column].half()) for column in kept]
        starts.append(len(columns))
    assert (outliers.values.tolist(), outliers.columns.tolist(), outliers.starts.tolist()) == (
        values,
        columns,
        starts,
    )
    assert outliers.values.dtype == torch.float16


@pytest.mark.parametrize("shape", SHAPES)
def test_added_to_zeros_outliers_are_the_halves_they_were_made_of(shape: tuple[int, int]) -> None:
    weight, chosen = normal(*shape), normal(*shape, seed=1) > 0.5
    dense = torch.where(chosen, 0, normal(*shape, seed=2))
    expected = torch.where(chosen, weight.half().float(), dense)
    add_outliers(dense, compress_rows(weight, chosen))
    assert torch.equal(dense, expected)


@pytest.mark.parametrize("value", [1e9, -1e9, 65519.0, -65520.0, 65504.0, 1e-9, 0.0])
def test_halves_are_finite(value: float) -> None:
    half = float(round_to_float16(torch.tensor(value)))
    assert abs(half) <= 65504
    assert half == pytest.approx(min(max(value, -65504), 65504), rel=2**-11, abs=2**-25)
