"""Half-quadratic grids with integer zero points: a light method that needs no data and looks at errors in the l_p sense, p < 1.

Source: Half-Quadratic Quantization, Badri and Shaji 2023: over the full range of a group, with W_q = s (codes - z), take by turns
    W_e  = shrink(W - W_q),  shrink(x) = sign(x) max(0, |x| - p |x|^(p-1) / beta)       what the grid need not fit
    z    = mean over the group of codes - (W - W_e) / s                                 the zero point, in closed form
with beta growing by a factor at each turn. A departure: zero points are stored as integers of the codes' width, not in 16 bits, so
each turn's is rounded, and the one of the least sum |W - W_q|^p is kept. That leaves little of the method: among random weights
and those of a language model no group was found whose zero point is not that of plain rounding over the full range.
"""

import torch
from torch import Tensor

from quantizer.grid import LARGEST_SCALE, SMALLEST_SCALE, dequantize, quantize

METHOD = "hqq-2"
"""Names what this module computes. A change of its results gets a new name."""

NORM, BETA, GROWTH, TURNS = 0.7, 10.0, 1.01, 20

_TINY = 1e-8


def fit_robust_grid(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Fit one grid per row by half-quadratic turns.

    Args:
        weight: float32 [rows, columns].
        bits: code width.

    Returns:
        scale of the full range, exactly representable in 16 bits, and integer zero point, both float32 [rows, 1]. The row's
        sum |W - W_q|^p is never more than that of rounding with the zero point that belongs to the range.
    """
    top = 2**bits - 1
    low = weight.amin(1, keepdim=True).clamp_(max=0)
    high = weight.amax(1, keepdim=True).clamp_(min=0)
    scale = ((high - low) / top).clamp_(SMALLEST_SCALE, LARGEST_SCALE).half().float()
    best_error, best_zero = torch.full_like(low, torch.inf), torch.zeros_like(low)
    exact, beta = -low / scale, BETA
    for _ in range(TURNS):
        zero = exact.round().clamp_(0, top)
        codes = quantize(weight, scale, zero, bits)
        rest = weight - dequantize(codes, scale, zero)
        error = lp_error(rest)
        better = error < best_error
        if not bool(better.any()):
            break
        best_error, best_zero = torch.where(better, error, best_error), torch.where(better, zero, best_zero)
        exact = (codes - (weight - shrink(rest, beta)) / scale).mean(1, keepdim=True)
        beta *= GROWTH
    return scale, best_zero


def shrink(rest: Tensor, beta: float) -> Tensor:
    """Return the half-quadratic threshold of each element: sign(x) max(0, |x| - p |x|^(p-1) / beta)."""
    size = rest.abs()
    return rest.sign() * (size - NORM / beta * (size + _TINY) ** (NORM - 1)).clamp_(min=0)


def lp_error(rest: Tensor) -> Tensor:
    """Return sum |x|^p of each row, [rows, 1]."""
    return rest.abs().pow(NORM).sum(1, keepdim=True)
