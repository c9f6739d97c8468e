"""The loops that find codes on a processor, compiled by numba as those of `quantizer.kernels.numba_matmul`.

Weights come column by column, [columns, outputs]: an output does not look at others, so inner loops
run over neighbouring outputs, and become vector instructions whose sums do not depend on how wide
these are. Some outputs at a time stay in the nearest cache.
"""

import numpy as np
from numba import float32, njit

from quantizer.kernels.numba_matmul import CACHE_ON_DISK, Floats, Numbers

BLOCK = 128
"""Outputs whose weights in a group of 64 columns take a processor's nearest cache."""

WHOLE = float32(2**23)
"""From here on floats have no digits behind the point, so adding this rounds, ties to even."""
_UNCHECKED = "numpy"
"""Divisors are not looked at: what asks each whether it is zero is not made vector instructions."""


@njit(cache=CACHE_ON_DISK, error_model=_UNCHECKED)
def _code(value: float, scale: float, zero: float, top: float) -> float:
    """Return the code of a weight, see `quantizer.packed.grid.quantize`."""
    code: float = (min(max(value / scale + zero, float32(0)), top) + WHOLE) - WHOLE
    return code


@njit(cache=CACHE_ON_DISK, error_model=_UNCHECKED)
def _add_errors(
    values: Floats, share: float, scale: Floats, zero: Floats, top: float, sums: Floats
) -> None:
    for at in range(len(sums)):
        error = (_code(values[at], scale[at], zero[at], top) - zero[at]) * scale[at] - values[at]
        sums[at] += share * (error * error)


@njit(cache=CACHE_ON_DISK, error_model=_UNCHECKED, nogil=True)
def best_grids(
    weight: Floats, importance: Floats, scales: Floats, zeros: Floats, top: float, best: Numbers
) -> None:
    """Write which grid of each output has the least error, the first of equals.

    See `quantizer.rounding.grids.best_grids`.

    Args:
        weight: [columns, outputs].
        importance: of each column's squared error, [columns].
        scales: of each grid and output, [grids, outputs].
        zeros: their zero points, [grids, outputs].
        top: the largest code.
        best: int64 [outputs].
    """
    columns, outputs = weight.shape
    sums, least = np.empty(outputs, np.float32), np.empty(outputs, np.float32)
    for first in range(0, outputs, BLOCK):
        last = min(first + BLOCK, outputs)
        for grid in range(len(scales)):
            scale, zero = scales[grid, first:last], zeros[grid, first:last]
            sums[first:last] = 0
            for column in range(columns):
                _add_errors(
                    weight[column, first:last],
                    importance[column],
                    scale,
                    zero,
                    top,
                    sums[first:last],
                )
            for output in range(first, last):
                if grid == 0 or sums[output] < least[output]:
                    least[output], best[output] = sums[output], grid


@njit(cache=CACHE_ON_DISK, error_model=_UNCHECKED)
def _round_column(
    values: Floats,
    scale: Floats,
    zero: Floats,
    top: float,
    pivot: float,
    codes: Floats,
    errors: Floats,
) -> None:
    for at in range(len(values)):
        codes[at] = _code(values[at], scale[at], zero[at], top)
        errors[at] = (values[at] - (codes[at] - zero[at]) * scale[at]) / pivot


@njit(cache=CACHE_ON_DISK, error_model=_UNCHECKED)
def _absorb(values: Floats, share: float, errors: Floats) -> None:
    for at in range(len(values)):
        values[at] -= share * errors[at]


@njit(cache=CACHE_ON_DISK, error_model=_UNCHECKED, nogil=True)
def compensate(
    weight: Floats,
    factor: Floats,
    scale: Floats,
    zero: Floats,
    top: float,
    codes: Floats,
    errors: Floats,
) -> None:
    """Write the codes of some columns, each after the columns before it have left it their errors.

    Weights change in place.

    Args:
        weight: [columns, outputs].
        factor: of these columns, see `quantizer.rounding.inverse.upper_factor`, [columns, columns].
        scale: of each output, [outputs].
        zero: its zero point, [outputs].
        top: the largest code.
        codes: [columns, outputs].
        errors: what is left of each weight, divided by its column's pivot, [columns, outputs].
    """
    columns, outputs = weight.shape
    for first in range(0, outputs, BLOCK):
        last = min(first + BLOCK, outputs)
        for column in range(columns):
            mine = errors[column, first:last]
            values, pivot = weight[column, first:last], factor[column, column]
            _round_column(
                values,
                scale[first:last],
                zero[first:last],
                top,
                pivot,
                codes[column, first:last],
                mine,
            )
            for later in range(column + 1, columns):
                _absorb(weight[later, first:last], factor[column, later], mine)
