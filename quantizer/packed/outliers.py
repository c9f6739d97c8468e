"""Outliers: single weights that are stored in 16 bits beside the quantized, dense weight.

Source: the dense-and-sparse decomposition of SqueezeLLM, arXiv 2306.07629, section 4.3. The stored
value is the whole weight. It is added to the dense weight, in which the quantizer leaves an exact
zero at this place: so adding is replacing, and no difference is rounded to 16 bits. A kernel may
multiply by the dense weight and by the outliers separately, and add the products.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantizer.packed.grid import FLOAT16_MAX


@dataclass(frozen=True, slots=True)
class Outliers:
    """Single weights in compressed sparse rows (CSR).

    Attributes:
        values: float16 [count], row after row.
        columns: input column of each value in the layer's own order, ascending within a row, int64
            [count].
        starts: index of the first value of each row, and at last their number, int64 [out + 1].
    """

    values: Tensor
    columns: Tensor
    starts: Tensor


def output_error_scores(weight: Tensor, diagonal: Tensor) -> Tensor:
    """Return H_jj * w_ij**2, the squared output error of setting a weight to zero, [out, in].

    It is the default score by which outliers are chosen.

    Args:
        weight: [out, in].
        diagonal: of the second moments of the inputs, [in].
    """
    return diagonal * weight.square()


def choose_outliers(scores: Tensor, count: int) -> Tensor:
    """Return a mask of the `count` highest scores, bool [out, in].

    Among equal scores the first in reading order are chosen.

    Raises:
        ValueError: a score is NaN.
    """
    flat = scores.flatten()
    if bool(flat.isnan().any()):
        raise ValueError("an outlier score is not a number: give scores that can be ordered")
    threshold = flat.topk(count).values[-1]
    chosen = flat > threshold
    chosen[(flat == threshold).nonzero()[: count - int(chosen.sum()), 0]] = True
    return chosen.view_as(scores)


def round_to_float16(weight: Tensor) -> Tensor:
    """Return the nearest finite float16 numbers, as float32."""
    return weight.clamp(-FLOAT16_MAX, FLOAT16_MAX).half().float()


def compress_rows(weight: Tensor, chosen: Tensor) -> Outliers:
    """Return the chosen weights in compressed sparse rows.

    Args:
        weight: [out, in] in the layer's own order of columns.
        chosen: mask of the outliers, bool [out, in].
    """
    starts = torch.zeros(len(weight) + 1, dtype=torch.int64, device=weight.device)
    starts[1:] = chosen.sum(1).cumsum(0)
    return Outliers(round_to_float16(weight[chosen]).half(), chosen.nonzero()[:, 1], starts)


def add_outliers(dense: Tensor, outliers: Outliers) -> None:
    """Add the outliers to `dense`, float32 [out, in], in place."""
    rows = torch.arange(len(dense), device=dense.device).repeat_interleave(
        outliers.starts.diff(), output_size=outliers.values.numel()
    )
    dense.index_put_((rows, outliers.columns), outliers.values.float(), accumulate=True)
