"""Which cases of a parametrized test are run by `make test`, and which by `make test-long` only."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def sampled(cases: Iterable[Any], in_gate: Callable[..., bool]) -> list[Any]:
    """Return all cases, marked as long where `in_gate` is false for them.

    Args:
        cases: values of one parameter, or tuples of the values of several.
        in_gate: takes the values of a case.
    """
    marked = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        marks = () if in_gate(*values) else pytest.mark.long
        marked.append(pytest.param(*values, marks=marks))
    return marked
