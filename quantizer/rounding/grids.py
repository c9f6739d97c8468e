"""The search for grids: the scale and zero point of each group that lose least."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from quantizer.kernels import numba_rounding
from quantizer.kernels.path import CPU, choose_kernel_path
from quantizer.packed.grid import dequantize, quantize, round_scale_to_float16
from quantizer.plans.fidelity import Fidelity

HEADROOM = 1.5
"""How much larger than at first a group's scale may become by errors that it absorbs before its turn comes. Without headroom
two-bit layers with strongly correlated inputs lose a tenth; with it they lose nothing, and codes
stay fine enough."""


SHRINKS = tuple(1 - 0.05 * step for step in range(13))
"""Shares of the full range that are tried; at 2 bits the best is usually near 0.7."""

COARSE_SHRINKS = SHRINKS[::4]
"""Those that are enough to know about how large a scale will be."""


def fit_grid(
    weight: Tensor,
    bits: int,
    importance: Tensor,
    representable: Callable[[Tensor], Tensor] = round_scale_to_float16,
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
    if choose_kernel_path(weight.device.type).name == CPU:
        best = torch.empty(1, len(weight), 1, dtype=torch.int64)
        tensors = weight.t(), importance, scales[..., 0], zeros[..., 0]
        numba_rounding.best_grids(
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


def fit_row_scale(weight: Tensor, importance: Tensor, fidelity: Fidelity) -> Tensor:
    """Return row scales under which the scale of every group has a code, fixed before any group is quantized.

    That is `HEADROOM` times the largest scale in a row, that of a high-impact group times
    2**(bits_hi - bits_lo), when each group is fitted by itself among
    `quantizer.rounding.grids.COARSE_SHRINKS`, divided by the largest code and rounded up to a 16-bit float.
    Subnormal halves have few digits but do no harm: codes make up for what was rounded up.

    Args:
        weight: in stored order, float32 [out, in].
        importance: see `quantizer.rounding.grids.fit_grid`, [in].
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
