"""Fit grids: search the scale and zero point of each group of columns with the least error."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from quantizer.kernels import numba_rounding
from quantizer.kernels.path import CPU, choose_kernel_path
from quantizer.packed.grid import dequantize, quantize, round_scale_to_float16

SHRINKS = tuple(1 - 0.05 * step for step in range(13))
"""Shares of the full range of weights that are tried; at 2 bits the best is usually near 0.7."""

COARSE_SHRINKS = SHRINKS[::4]
"""Fewer shares, enough to estimate how large a scale will be."""


def fit_grid(
    weight: Tensor,
    bits: int,
    importance: Tensor,
    representable: Callable[[Tensor], Tensor] = round_scale_to_float16,
    shrinks: Sequence[float] = SHRINKS,
) -> tuple[Tensor, Tensor]:
    """Fit one grid to each row by a search over the range that the grid spans.

    For a share p of the full range the grid spans p * [min(w, 0), max(w, 0)]. For each row, the p
    with the least sum_j importance_j * (w_j - dequantized w_j)**2 is taken. Zero is always on the
    grid.

    Args:
        weight: float32 [rows, columns].
        bits: code width.
        importance: non-negative weight of each column's squared error, float32 [columns].
        representable: rounds positive scales, [rows, 1], to ones that can be stored. It applies
            before errors are measured, so that the search is among grids that can be stored.
        shrinks: shares of the full range to try, at least one.

    Returns:
        The scale, representable, and the zero point, a whole number; both float32 [rows, 1].
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
    """Return the index of the grid with the least error of each row, the first among equals.

    The error is sum_j importance_j * (w_j - dequantized w_j)**2.

    Args:
        weight: float32 [rows, columns]; fastest if its transpose is contiguous.
        bits: code width.
        importance: see `fit_grid`, [columns].
        scales: scale of each grid, positive, float32 [grids, rows, 1].
        zeros: zero point of each grid, float32 [grids, rows, 1].

    Returns:
        int64 [1, rows, 1].
    """
    if choose_kernel_path(weight.device.type).name == CPU:
        best = torch.empty(1, len(weight), 1, dtype=torch.int64)
        tensors = (weight.t(), importance, scales[..., 0], zeros[..., 0])
        numba_rounding.best_grids(
            *(tensor.contiguous().numpy() for tensor in tensors),
            np.float32(2**bits - 1),
            best[0, :, 0].numpy(),
        )
        return best
    tried = torch.empty_like(weight)
    errors = []
    for scale, zero in zip(scales, zeros, strict=True):
        quantize(weight, scale, zero, bits, out=tried)
        squared = dequantize(tried, scale, zero, out=tried).sub_(weight).square_()
        errors.append(squared @ importance.unsqueeze(1))
    return torch.stack(errors).argmin(0, keepdim=True)


def round_to_nearest(weight: Tensor, bits: int, group_size: int, importance: Tensor) -> Tensor:
    """Return `weight` with each group of columns rounded to its own fitted grid.

    Columns keep their order.

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
        codes = quantize(weight[:, columns], scale, zero, bits)
        rounded[:, columns] = dequantize(codes, scale, zero)
    return rounded
