"""Bisection over real numbers; for whole ones there is `bisect.bisect_left(range(...), key=)`."""

from collections.abc import Callable


def bisect_real(
    beyond: Callable[[float], bool],
    low: float,
    high: float,
    *,
    steps: int,
    relative_width: float = 0.0,
) -> tuple[float, float]:
    """Narrow an interval around the point from which a monotone condition holds.

    Args:
        beyond: the condition, taken to be false at `low` and true at `high`; it is not asked there.
        low: lower end.
        high: upper end.
        steps: halvings at most.
        relative_width: ends earlier once the interval is this narrow, as a share of its upper end.

    Returns:
        The ends of the last interval.
    """
    for _ in range(steps):
        if high - low <= relative_width * high:
            break
        middle = (low + high) / 2
        if beyond(middle):
            high = middle
        else:
            low = middle
    return low, high
