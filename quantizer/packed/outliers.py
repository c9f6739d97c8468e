"""Outliers: single weights kept in 16 bits beside the dense part, row by row.

Source: the dense-and-sparse decomposition of SqueezeLLM, arXiv 2306.07629, section 4.3. A stored
value is the whole weight and is added to the dense part, in which the quantizer leaves an exact
zero at its place. So addition is replacement, without the loss that a difference rounded to 16 bits
would bring, and a kernel may multiply by either part alone and add the products.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantizer.packed.grid import FLOAT16_MAX


@dataclass(frozen=True, slots=True)
class Outliers:
    """Single weights in compressed rows.

    Attributes:
        values: float16 [count], row after row.
        columns: input column of each in the layer's own order, ascending inside a row, int64
            [count].
        starts: where each row begins in them, and at last their number, int64 [out + 1].
    """

    values: Tensor
    columns: Tensor
    starts: Tensor


def output_error_scores(weight: Tensor, diagonal: Tensor) -> Tensor:
    """Return H_jj * w_ij**2, the output error of leaving a weight out.

    What is chosen by if nothing better is known, [out, in].
    """
    return diagonal * weight.square()


def choose_outliers(scores: Tensor, count: int) -> Tensor:
    """Return where the `count` highest scores are, bool [out, in].

    Among equal ones the first in reading order.

    Raises:
        ValueError: a score is not a number.
    """
    flat = scores.flatten()
    if bool(flat.isnan().any()):
        raise ValueError("an outlier score is not a number: give scores that can be ordered")
    threshold = flat.topk(count).values[-1]
    chosen = flat > threshold
    chosen[(flat == threshold).nonzero()[: count - int(chosen.sum()), 0]] = True
    return chosen.view_as(scores)


def round_to_float16(weight: Tensor) -> Tensor:
    """Return the nearest finite 16-bit floats, as float32."""
    return weight.clamp(-FLOAT16_MAX, FLOAT16_MAX).half().float()


def compress_rows(weight: Tensor, chosen: Tensor) -> Outliers:
    """Return the weights at the places `chosen`.

    Both [out, in] in the layer's own order of columns.
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
