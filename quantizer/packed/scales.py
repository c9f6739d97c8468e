"""Scales of few bits: an unsigned integer for each group, times one float16 for each row.

scale[g, n] = unit[n] * code[g, n] with 1 <= code <= 2**scale_bits - 1. The unit of the low part is
the row scale. The unit of the high-impact part is the row scale / 2**(bits_hi - bits_lo), as its
grids are finer by about this factor: with the same unit, an 8-bit part beside a 4-bit one would
have twice the error. A float16 times a power of two and a code is exact in float32, so a scale is
the same number on every machine. Source: double quantization of QLoRA, arXiv 2305.14314, section 3,
here with a linear code for each row.
"""

from torch import Tensor

from quantizer.plans.fidelity import Fidelity


def scale_unit(row_scale: Tensor, fidelity: Fidelity, bits: int) -> Tensor:
    """Return the unit of the scale codes of a part: row_scale * 2**(bits_lo - bits).

    Args:
        row_scale: one for each row of the layer, any shape.
        fidelity: of the layer.
        bits: code width of the part.
    """
    return row_scale * 2.0 ** (fidelity.bits_lo - bits)


def quantize_scale(scale: Tensor, unit: Tensor, scale_bits: int) -> Tensor:
    """Return the representable scale nearest to `scale`.

    Representable are unit * code with 1 <= code <= 2**scale_bits - 1. `scale` and `unit` broadcast
    against each other.
    """
    return unit * (scale / unit).round_().clamp_(1, 2**scale_bits - 1)


def scale_codes(scale: Tensor, unit: Tensor) -> Tensor:
    """Return the codes of representable scales, as floats.

    The division is exact, as each scale is an integer multiple of its unit.
    """
    return scale / unit
