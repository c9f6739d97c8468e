"""Scales of few bits: a small unsigned integer for each group under one 16-bit float for each row of the layer.

scale[g, n] = unit[n] * code[g, n] with 1 <= code <= 2**scale_bits - 1. The unit of the low part is
the row's scale; that of the high-impact part is smaller by 2**(bits_hi - bits_lo), as its grids are
finer by about as much: under the same unit an 8-bit part beside a 4-bit one has twice the error. A
half times a power of two and a code is exact in float32, so a coded scale is one number on every
machine. Source: double quantization, QLoRA, arXiv 2305.14314, section 3, here with a linear code
for each row.
"""

from torch import Tensor

from quantizer.plans.fidelity import Fidelity


def scale_unit(row_scale: Tensor, fidelity: Fidelity, bits: int) -> Tensor:
    """Return what a scale code of the part of `bits` counts, row by row.

    row_scale * 2**(bits_lo - bits).
    """
    return row_scale * 2.0 ** (fidelity.bits_lo - bits)


def quantize_scale(scale: Tensor, unit: Tensor, scale_bits: int) -> Tensor:
    """Return the multiple of `unit` that is nearest to `scale` among those that have a code.

    Both broadcast.
    """
    return unit * (scale / unit).round_().clamp_(1, 2**scale_bits - 1)


def scale_codes(scale: Tensor, unit: Tensor) -> Tensor:
    """Return the codes of coded scales, integers as floats.

    Exact, as `scale` is an exact multiple of `unit`.
    """
    return scale / unit
