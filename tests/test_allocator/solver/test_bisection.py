"""Bisection over real numbers narrows to where a condition begins to hold."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.solver.bisection import bisect_real
from tests.support.synthetic_profiles import PROPERTY


@PROPERTY
@given(
    low=st.floats(-1e6, 1e6),
    width=st.floats(1e-3, 1e6),
    place=st.floats(0.01, 0.99),
    steps=st.integers(0, 60),
)
def test_the_interval_keeps_the_threshold_and_halves(
    low: float, width: float, place: float, steps: int
) -> None:
    threshold = low + place * width
    left, right = bisect_real(lambda at: at >= threshold, low, low + width, steps=steps)
    assert left <= threshold <= right
    assert right - left == pytest.approx(width / 2**steps, rel=1e-3, abs=1e-9)


def test_the_search_ends_once_the_interval_is_narrow() -> None:
    asked: list[float] = []

    def beyond(at: float) -> bool:
        asked.append(at)
        return at >= 3.0

    low, high = bisect_real(beyond, 0.0, 8.0, steps=100, relative_width=0.1)
    assert low < 3.0 <= high
    assert high - low <= 0.1 * high
    assert len(asked) < 10


def test_the_ends_are_not_asked() -> None:
    asked: list[float] = []
    bisect_real(lambda at: asked.append(at) is None, 0.0, 1.0, steps=5)
    assert asked == [1 / 2**step for step in range(1, 6)]
