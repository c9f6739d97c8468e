"""Asymmetric integer grids.

The light method that fits a scale and a zero point to a group of columns.
"""

import torch
from torch import Tensor

FLOAT16_SMALLEST_NORMAL = 2.0**-14
"""Smallest normal 16-bit float: smaller scales would lose precision when stored."""
FLOAT16_MAX = 65504.0


def quantize(
    weight: Tensor, scale: Tensor, zero: Tensor, bits: int, out: Tensor | None = None
) -> Tensor:
    """Return codes clip(round(weight / scale + zero), 0, 2**bits - 1) as floats, in `out` if it is given.

    Scale and zero broadcast against weight.
    """
    return torch.div(weight, scale, out=out).add_(zero).round_().clamp_(0, 2**bits - 1)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor, out: Tensor | None = None) -> Tensor:
    """Return scale * (codes - zero), in `out` if it is given, which may be the codes themselves."""
    return torch.sub(codes, zero, out=out).mul_(scale)


def round_scale_to_float16(scale: Tensor) -> Tensor:
    """Return the nearest scales that are normal 16-bit floats, as float32."""
    return scale.clamp(FLOAT16_SMALLEST_NORMAL, FLOAT16_MAX).half().float()
