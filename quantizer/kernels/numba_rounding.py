"""Search of grids and error-compensated rounding on a CPU, compiled by numba.

Weights are stored column by column, [columns, outputs]. Outputs are independent of each other, so
inner loops run over neighbouring outputs and become vector instructions; results do not depend on
how wide these are. Blocks of outputs stay in the L1 cache.
"""

import numpy as np

from quantizer.kernels.jit import compiled, float32
from quantizer.kernels.numba_matmul import Floats, Indices

BLOCK_OUTPUTS = 128
"""The weights of so many outputs in a group of 64 columns fill a CPU's L1 cache."""

ROUNDING = float32(2**23)
"""Floats from 2**23 on are whole numbers, so adding and subtracting this rounds, ties to even."""
_UNCHECKED = "numpy"
"""Divisors are not compared with zero: such comparisons would keep loops from being vectorised."""


@compiled(error_model=_UNCHECKED)
def _quantize(value: float, scale: float, zero: float, top: float) -> float:
    """Return the code of a weight, see `quantizer.packed.grid.quantize`."""
    code: float = (min(max(value / scale + zero, float32(0)), top) + ROUNDING) - ROUNDING
    return code


@compiled(error_model=_UNCHECKED)
def _add_squared_errors(
    values: Floats, share: float, scale: Floats, zero: Floats, top: float, sums: Floats
) -> None:
    for at in range(len(sums)):
        code = _quantize(values[at], scale[at], zero[at], top)
        error = (code - zero[at]) * scale[at] - values[at]
        sums[at] += share * (error * error)


@compiled(error_model=_UNCHECKED, nogil=True)
def best_grids(
    weight: Floats, importance: Floats, scales: Floats, zeros: Floats, top: float, best: Indices
) -> None:
    """Write the number of the grid with the least error of each output, the first among equals.

    See `quantizer.rounding.grids.best_grids`.

    Args:
        weight: [columns, outputs].
        importance: weight of each column's squared error, [columns].
        scales: of each grid and output, [grids, outputs].
        zeros: their zero points, [grids, outputs].
        top: the largest code.
        best: the result, [outputs].
    """
    columns, outputs = weight.shape
    sums, least = np.empty(outputs, np.float32), np.empty(outputs, np.float32)
    for first in range(0, outputs, BLOCK_OUTPUTS):
        last = min(first + BLOCK_OUTPUTS, outputs)
        for grid in range(len(scales)):
            scale, zero = scales[grid, first:last], zeros[grid, first:last]
            sums[first:last] = 0
            for column in range(columns):
                _add_squared_errors(
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


@compiled(error_model=_UNCHECKED)
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
        codes[at] = _quantize(values[at], scale[at], zero[at], top)
        errors[at] = (values[at] - (codes[at] - zero[at]) * scale[at]) / pivot


@compiled(error_model=_UNCHECKED)
def _subtract_error(values: Floats, share: float, errors: Floats) -> None:
    for at in range(len(values)):
        values[at] -= share * errors[at]


@compiled(error_model=_UNCHECKED, nogil=True)
def compensate(
    weight: Floats,
    factor: Floats,
    scale: Floats,
    zero: Floats,
    top: float,
    codes: Floats,
    errors: Floats,
) -> None:
    """Round columns one after the other, and add each rounding error to the columns after it.

    This is the inner loop of GPTQ (arXiv 2210.17323, algorithm 1); see `quantizer.rounding.gptq`.

    Args:
        weight: [columns, outputs]; changed in place.
        factor: of these columns, see `quantizer.rounding.inverse.upper_factor`, [columns, columns].
        scale: of each output, [outputs].
        zero: zero point of each output, [outputs].
        top: the largest code.
        codes: the resulting codes, [columns, outputs].
        errors: the resulting errors, divided by the pivot of their column, [columns, outputs].
    """
    columns, outputs = weight.shape
    for first in range(0, outputs, BLOCK_OUTPUTS):
        last = min(first + BLOCK_OUTPUTS, outputs)
        for column in range(columns):
            error = errors[column, first:last]
            values, pivot = weight[column, first:last], factor[column, column]
            _round_column(
                values,
                scale[first:last],
                zero[first:last],
                top,
                pivot,
                codes[column, first:last],
                error,
            )
            for later in range(column + 1, columns):
                _subtract_error(weight[later, first:last], factor[column, later], error)
