"""Which input columns of a layer are high-impact, and the order in which columns are quantized."""

import torch
from torch import Tensor

from quantizer.plans.fidelity import Fidelity
from quantizer.rounding.grids import round_to_nearest
from quantizer.rounding.inverse import damped_inverse


def column_impact(weight: Tensor, hessian: Tensor, bits: int, group_size: int) -> Tensor:
    """Return the output error that rounding each input column to `bits` bits would cause.

    The error of column j is H_jj * ||w_j - rounded w_j||**2. Source: OWQ, arXiv 2306.02272, section
    3, applied to round-to-nearest errors on fitted grids.

    Args:
        weight: float32 [out, in].
        hessian: second moments of the layer's inputs, [in, in].
        bits: code width.
        group_size: columns that share a grid.

    Returns:
        float32 [in], non-negative.
    """
    diagonal = hessian.diagonal()
    error = round_to_nearest(weight, bits, group_size, diagonal) - weight
    return diagonal * error.square_().sum(0)


def sparsity_impact(weight: Tensor, hessian: Tensor) -> Tensor:
    """Return what removing each input column would cost after the other columns compensate it.

    The score of column j is sum_i w_ij^2 / [H^-1]_jj^2. A reconstruction: SGR-Q scores columns by a
    "sparsity Hessian" of which no formula is public. This is the score by which SparseGPT (arXiv
    2301.00774, section 3.1) and SpQR find weights that matter, with the square of PB-LLM (arXiv
    2310.00034).

    Args:
        weight: float32 [out, in].
        hessian: second moments of the layer's inputs, [in, in], damped as in
            `quantizer.rounding.inverse`. All zeros stand for the identity.

    Returns:
        float32 [in], non-negative.
    """
    if not bool(hessian.diagonal().any()):
        return weight.square().sum(0)
    return weight.square().sum(0) / damped_inverse(hessian).diagonal().float().square()


def random_impact(columns: int) -> Tensor:
    """Return random scores, the same for the same number of columns: a control for other scores.

    Returns:
        float32 [columns].
    """
    return torch.rand(columns, generator=torch.Generator().manual_seed(columns))


def knee(scores: Tensor) -> int:
    """Return how many of the highest scores lie before the knee of their cumulative share.

    With scores in descending order and F(k) the share of their sum in the first k of n, the knee is
    the k of the largest F(k) - k / n, the first among equals: scores after it are below average.
    A reconstruction: SGR-Q cuts at an "inflection point" of the cumulative scores that is defined
    nowhere in public; this is the Kneedle rule (Satopaa et al. 2011, section III).

    Args:
        scores: non-negative, [n], n > 0.

    Returns:
        1 .. n; n if all scores are equal, as none stands out.
    """
    count = len(scores)
    total = float(scores.double().sum())
    if total <= 0:
        return count
    ordered = scores.double().sort(descending=True).values
    ranks = torch.arange(1, count + 1, dtype=torch.float64, device=scores.device)
    above = ordered.cumsum(0) / total - ranks / count
    best = int(above.argmax())
    return best + 1 if float(above[best]) > count * torch.finfo(torch.float64).eps else count


def column_order(impact: Tensor, diagonal: Tensor, fidelity: Fidelity) -> Tensor:
    """Return the order in which columns are quantized and stored.

    The high-impact part comes first, then the low part. In each part, columns with larger second
    moments come first, so that the many columns after them can compensate their errors (the
    activation order of GPTQ implementations). Ties keep the columns' own order.

    Args:
        impact: score of each column; the highest scores make up the high-impact part, [in].
        diagonal: second moment of each input, [in].
        fidelity: how large the high-impact part is.

    Returns:
        int64 [in], a permutation of 0 .. in-1.
    """
    high = fidelity.high_columns(impact.numel())
    by_moment = diagonal.argsort(descending=True, stable=True)
    is_high = torch.zeros(impact.numel(), dtype=torch.bool, device=impact.device)
    is_high[impact.argsort(descending=True, stable=True)[:high]] = True
    high_first = is_high[by_moment]
    return torch.cat([by_moment[high_first], by_moment[~high_first]])
