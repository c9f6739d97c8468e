"""Fit row scales, under which the scales of a row's groups are coded in few bits."""

import torch
from torch import Tensor

from quantizer.plans.fidelity import Fidelity
from quantizer.rounding.grids import COARSE_SHRINKS, fit_grid

HEADROOM = 1.5
"""Factor by which the scale of a group may grow while it absorbs the errors of earlier columns.

Without headroom, two-bit layers with strongly correlated inputs lose a tenth; with it they lose
nothing, and codes stay fine enough: tests/benchmarks/LOG.md, "training, formats, light methods".
"""


def fit_row_scale(weight: Tensor, importance: Tensor, fidelity: Fidelity) -> Tensor:
    """Return row scales under which the scale of every group has a code.

    Row scales are fixed before any group is quantized. They are `HEADROOM` times the largest scale
    in a row when each group is fitted by itself among `COARSE_SHRINKS`, divided by the largest code
    and rounded up to a 16-bit float; the scale of a high-impact group counts 2**(bits_hi - bits_lo)
    times. Subnormal 16-bit floats have few digits but do no harm, as the codes of the scales make
    up for what was rounded up.

    Args:
        weight: float32 [out, in], columns in stored order.
        importance: see `quantizer.rounding.grids.fit_grid`, [in].
        fidelity: parts, group size and width of the scales.

    Returns:
        float32 [out, 1], positive and exactly representable in 16 bits.
    """
    largest = torch.zeros_like(weight[:, :1])
    start = 0
    for count, bits in fidelity.parts(weight.shape[1]):
        for first in range(start, start + count, fidelity.group_size):
            group = slice(first, min(first + fidelity.group_size, start + count))
            scale, _ = fit_grid(weight[:, group], bits, importance[group], shrinks=COARSE_SHRINKS)
            largest = torch.maximum(largest, scale * 2.0 ** (bits - fidelity.bits_lo))
        start += count
    return _float16_above(largest * HEADROOM / (2**fidelity.scale_bits - 1)).float()


def _float16_above(values: Tensor) -> Tensor:
    """Return the smallest 16-bit floats that are not below positive `values`.

    The next larger 16-bit float has the next bit pattern.
    """
    halves = values.half()
    is_below = (halves.float() < values).to(torch.int16)
    return (halves.view(torch.int16) + is_below).view(torch.float16)
