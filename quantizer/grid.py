"""Asymmetric integer grids.

The light method that fits a scale and a zero point to a group of columns.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from quantizer.kernels.path import CPU, choose_path

SHRINKS = tuple(1 - 0.05 * step for step in range(13))
"""Shares of the full range that are tried; at 2 bits the best is usually near 0.7."""
COARSE_SHRINKS = SHRINKS[::4]
"""Those that are enough to know about how large a scale will be."""

SMALLEST_SCALE = 2.0**-14
"""Smallest normal 16-bit float: smaller scales would lose precision when stored."""
LARGEST_SCALE = 65504.0


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


def half_scale(scale: Tensor) -> Tensor:
    """Return the nearest scales that are normal 16-bit floats, as float32."""
    return scale.clamp(SMALLEST_SCALE, LARGEST_SCALE).half().float()


def fit_grid(
    weight: Tensor,
    bits: int,
    importance: Tensor,
    representable: Callable[[Tensor], Tensor] = half_scale,
    shrinks: Sequence[float] = SHRINKS,
) -> tuple[Tensor, Tensor]:
    """Fit one grid per row by searching how far to shrink the range.

    For p among the shrinks the grid spans p * [min(w, 0), max(w, 0)]; the p with the smallest
    sum_j importance_j * (w_j - dequantized w_j)**2 wins, row by row. Zero stays on the grid.

    Args:
        weight: float32 [rows, columns].
        bits: code width.
        importance: non-negative weight of each column's error, float32 [columns].
        representable: gives the positive scale near one that can be stored, [rows, 1] each. It
            comes before the error is measured, so the search is among grids that can be stored.
        shrinks: shares of the range to try, at least one.

    Returns:
        representable scale and integer zero point, both float32 [rows, 1].
    """
    top = 2**bits - 1
    low = weight.amin(1, keepdim=True).clamp_(max=0)
    high = weight.amax(1, keepdim=True).clamp_(min=0)
    shares = weight.new_tensor(shrinks).reshape(-1, 1, 1)
    scales = representable((high - low) * (shares / top))
    zeros = (low * -shares / scales).round_().clamp_(0, top)
    best = best_grids(weight, bits, importance, scales, zeros)
    return scales.gather(0, best)[0], zeros.gather(0, best)[0]


def best_grids(
    weight: Tensor, bits: int, importance: Tensor, scales: Tensor, zeros: Tensor
) -> Tensor:
    """Return which grid of each row has the least sum_j importance_j * (w_j - dequantized w_j)**2, the first of equals.

    Args:
        weight: float32 [rows, columns]; fastest where its transpose is contiguous.
        bits: code width.
        importance: see `fit_grid`, [columns].
        scales: of each grid, positive, float32 [grids, rows, 1].
        zeros: their zero points, float32 [grids, rows, 1].

    Returns:
        int64 [1, rows, 1].
    """
    if choose_path(weight.device.type).name == CPU:
        from quantizer.kernels import rounding  # noqa: PLC0415  numba takes a while to import, and may be missing

        best = torch.empty(1, len(weight), 1, dtype=torch.int64)
        tensors = weight.t(), importance, scales[..., 0], zeros[..., 0]
        rounding.best_grids(
            *(tensor.contiguous().numpy() for tensor in tensors),
            np.float32(2**bits - 1),
            best[0, :, 0].numpy(),
        )
        return best
    tried, errors = torch.empty_like(weight), []
    for scale, zero in zip(scales, zeros, strict=True):
        quantize(weight, scale, zero, bits, out=tried)
        errors.append(
            dequantize(tried, scale, zero, out=tried).sub_(weight).square_()
            @ importance.unsqueeze(1)
        )
    return torch.stack(errors).argmin(0, keepdim=True)


def round_to_nearest(weight: Tensor, bits: int, group_size: int, importance: Tensor) -> Tensor:
    """Return `weight` after rounding each group of columns to its own fitted grid, in the columns' own order.

    Args:
        weight: float32 [rows, columns].
        bits: code width.
        group_size: columns that share a grid; the last group may be smaller.
        importance: see `fit_grid`, [columns].

    Returns:
        float32 [rows, columns].
    """
    rounded = torch.empty_like(weight)
    for start in range(0, weight.shape[1], group_size):
        columns = slice(start, start + group_size)
        scale, zero = fit_grid(weight[:, columns], bits, importance[columns])
        rounded[:, columns] = dequantize(
            quantize(weight[:, columns], scale, zero, bits), scale, zero
        )
    return rounded
