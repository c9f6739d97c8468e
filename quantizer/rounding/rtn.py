"""Round to nearest: each group of columns on a grid of its own, without error compensation."""

import torch
from torch import Tensor

from quantizer.packed.grid import quantize
from quantizer.packed.weight import PartCodes, QuantizedWeight
from quantizer.plans.fidelity import Fidelity
from quantizer.rounding.columns import column_order
from quantizer.rounding.grids import fit_grid


def rtn_layer(
    weight: Tensor, hessian: Tensor, fidelity: Fidelity, impact: Tensor
) -> QuantizedWeight:
    """Quantize one layer by rounding each group of columns to its nearest codes.

    Args:
        weight: float32 [out, in].
        hessian: second moments of the inputs, [in, in]; their diagonal is the importance by which
            grids are fitted. All zeros stand for equal importance.
        fidelity: how to store the layer; with 16-bit scales, without outliers and adapter.
        impact: score of each input column, see `quantizer.rounding.columns.column_order`, [in].
    """
    importance = hessian.diagonal()
    if not bool(importance.any()):
        importance = torch.ones_like(impact)
    columns = column_order(impact, importance, fidelity)
    ordered = weight[:, columns]
    importance = importance[columns]
    parts = []
    start = 0
    for count, bits in fidelity.parts(ordered.shape[1]):
        part = slice(start, start + count)
        parts.append(_rounded(ordered[:, part], importance[part], bits, fidelity.group_size))
        start += count
    return QuantizedWeight.from_codes(fidelity, columns, tuple(parts))


def _rounded(weight: Tensor, importance: Tensor, bits: int, group_size: int) -> PartCodes:
    """Return the codes of a part, [out, columns of the part]."""
    codes = []
    scales = []
    zeros = []
    for start in range(0, weight.shape[1], group_size):
        group = slice(start, start + group_size)
        scale, zero = fit_grid(weight[:, group], bits, importance[group])
        codes.append(quantize(weight[:, group], scale, zero, bits))
        scales.append(scale[:, 0])
        zeros.append(zero[:, 0])
    return PartCodes(torch.cat(codes, 1), torch.stack(scales), torch.stack(zeros))
