"""Asymmetric integer grids: weight = scale * (code - zero point)."""

import torch
from torch import Tensor

FLOAT16_SMALLEST_NORMAL = 2.0**-14
"""Smaller scales would lose precision when stored as float16."""
FLOAT16_MAX = 65504.0


def quantize(
    weight: Tensor, scale: Tensor, zero: Tensor, bits: int, out: Tensor | None = None
) -> Tensor:
    """Return the codes clip(round(weight / scale + zero), 0, 2**bits - 1) as floats.

    Args:
        weight: any shape.
        scale: broadcasts against the weight.
        zero: zero point, broadcasts against the weight.
        bits: code width.
        out: where to write the codes.
    """
    return torch.div(weight, scale, out=out).add_(zero).round_().clamp_(0, 2**bits - 1)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor, out: Tensor | None = None) -> Tensor:
    """Return scale * (codes - zero), written to `out` if given, which may be `codes` itself."""
    return torch.sub(codes, zero, out=out).mul_(scale)


def round_scale_to_float16(scale: Tensor) -> Tensor:
    """Return the nearest scales that are normal float16 numbers, as float32."""
    return scale.clamp(FLOAT16_SMALLEST_NORMAL, FLOAT16_MAX).half().float()
