"""Which input columns of a layer are high-impact, and in which order columns are quantized."""

import torch
from torch import Tensor

from quantizer.fidelity import Fidelity
from quantizer.grid import round_to_nearest


def column_impact(weight: Tensor, hessian: Tensor, bits: int, group_size: int) -> Tensor:
    """Score each input column by the output error it would cause at `bits`: H_jj * ||w_j - rounded w_j||**2.

    Source: OWQ, arXiv 2306.02272, section 3, applied to round-to-nearest errors with a searched range.

    Args:
        weight: float32 [out, in].
        hessian: second moments of the layer's inputs, [in, in].
        bits: width whose rounding error is scored.
        group_size: columns that share a grid.

    Returns:
        float32 [in], non-negative.
    """
    diagonal = hessian.diagonal()
    error = round_to_nearest(weight, bits, group_size, diagonal) - weight
    return diagonal * error.square_().sum(0)


def column_order(impact: Tensor, diagonal: Tensor, fidelity: Fidelity) -> Tensor:
    """Return the order in which columns are quantized and stored: high-impact part first, then the low part.

    Within each part, columns with larger input second moments come first, so that their errors can be
    compensated by the many columns that follow (the activation order of GPTQ implementations). Ties keep the columns' own order.

    Args:
        impact: score of each column; the highest ones make up the high-impact part, [in].
        diagonal: second moment of each input, [in].
        fidelity: how large the high-impact part is.

    Returns:
        int64 [in], a permutation of 0 .. in-1.
    """
    high = fidelity.high_columns(impact.numel())
    by_moment = diagonal.argsort(descending=True, stable=True)
    is_high = torch.zeros(impact.numel(), dtype=torch.bool, device=impact.device)
    is_high[impact.argsort(descending=True, stable=True)[:high]] = True
    chosen = is_high[by_moment]
    return torch.cat([by_moment[chosen], by_moment[~chosen]])
