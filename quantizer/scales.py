"""Scales of few bits: a small unsigned integer for each group under one 16-bit float for each row of the layer.

scale[g, n] = unit[n] * code[g, n] with 1 <= code <= 2**scale_bits - 1. The unit of the low part is
the row's scale; that of the high-impact part is smaller by 2**(bits_hi - bits_lo), as its grids are
finer by about as much: under the same unit an 8-bit part beside a 4-bit one has twice the error. A
half times a power of two and a code is exact in float32, so a coded scale is one number on every
machine. Source: double quantization, QLoRA, arXiv 2305.14314, section 3, here with a linear code
for each row.
"""

import torch
from torch import Tensor

from quantizer.fidelity import Fidelity
from quantizer.grid import COARSE_SHRINKS, fit_grid

HEADROOM = 1.5
"""How much larger than at first a group's scale may become by errors that it absorbs before its turn comes. Without headroom
two-bit layers with strongly correlated inputs lose a tenth; with it they lose nothing, and codes
stay fine enough."""


def part_unit(row_scale: Tensor, fidelity: Fidelity, bits: int) -> Tensor:
    """Return what a scale code of the part of `bits` counts, row by row.

    row_scale * 2**(bits_lo - bits).
    """
    return row_scale * 2.0 ** (fidelity.bits_lo - bits)


def coded_scale(scale: Tensor, unit: Tensor, scale_bits: int) -> Tensor:
    """Return the multiple of `unit` that is nearest to `scale` among those that have a code.

    Both broadcast.
    """
    return unit * (scale / unit).round_().clamp_(1, 2**scale_bits - 1)


def scale_codes(scale: Tensor, unit: Tensor) -> Tensor:
    """Return the codes of coded scales, integers as floats.

    Exact, as `scale` is an exact multiple of `unit`.
    """
    return scale / unit


def fit_row_scale(weight: Tensor, importance: Tensor, fidelity: Fidelity) -> Tensor:
    """Return row scales under which the scale of every group has a code, fixed before any group is quantized.

    That is `HEADROOM` times the largest scale in a row, that of a high-impact group times
    2**(bits_hi - bits_lo), when each group is fitted by itself among
    `quantizer.grid.COARSE_SHRINKS`, divided by the largest code and rounded up to a 16-bit float.
    Subnormal halves have few digits but do no harm: codes make up for what was rounded up.

    Args:
        weight: in stored order, float32 [out, in].
        importance: see `quantizer.grid.fit_grid`, [in].
        fidelity: parts, group size and width of the scales.

    Returns:
        float32 [out, 1], positive and exactly representable in 16 bits.
    """
    largest, start = torch.zeros_like(weight[:, :1]), 0
    for count, bits in fidelity.parts(weight.shape[1]):
        for at in range(start, start + count, fidelity.group_size):
            group = slice(at, min(at + fidelity.group_size, start + count))
            scale, _ = fit_grid(weight[:, group], bits, importance[group], shrinks=COARSE_SHRINKS)
            largest = torch.maximum(largest, scale * 2.0 ** (bits - fidelity.bits_lo))
        start += count
    return _half_above(largest * HEADROOM / (2**fidelity.scale_bits - 1)).float()


def _half_above(values: Tensor) -> Tensor:
    """Return the smallest halves that are not below positive `values`.

    The next half has the next bit pattern.
    """
    halves = values.half()
    return (halves.view(torch.int16) + (halves.float() < values).to(torch.int16)).view(
        torch.float16
    )
