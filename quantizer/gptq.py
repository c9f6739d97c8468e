"""Error-compensated rounding: quantize columns one after another and let later columns absorb the errors of earlier ones.

Source: GPTQ, arXiv 2210.17323, section 3, steps 2 and 3. High-impact columns come first, so that their small errors and, above all,
the large errors of the low part can still be compensated inside the low part.
"""

import torch
from torch import Tensor

from quantizer.fidelity import Fidelity
from quantizer.grid import dequantize, fit_grid, quantize
from quantizer.inverse import inverse_factor
from quantizer.selection import column_order
from quantizer.weight import PartCodes, QuantizedWeight


def quantize_layer(weight: Tensor, hessian: Tensor, fidelity: Fidelity, impact: Tensor) -> QuantizedWeight:
    """Quantize one layer at `fidelity`, minimising the error of its outputs on the calibration inputs.

    The objective is tr((W - Q) H (W - Q)'), H being proportional to the sum of x x' over calibration inputs x.

    Args:
        weight: [out, in], finite.
        hessian: second moments of the inputs, symmetric positive semidefinite, [in, in]. All zeros, as for a layer that saw no
            input, means plain rounding.
        fidelity: how to store the layer.
        impact: score of each input column, see `quantizer.selection.column_impact`, [in].

    Returns:
        The stored form.
    """
    weight, hessian = weight.float(), hessian.float()
    if not bool(hessian.diagonal().any()):
        hessian = torch.eye(weight.shape[1], device=weight.device)
    columns = column_order(impact, hessian.diagonal(), fidelity)
    hessian = hessian[columns][:, columns]
    factor = inverse_factor(hessian)
    diagonal = hessian.diagonal()
    remaining = weight[:, columns].clone()
    parts, start = [], 0
    for count, bits in fidelity.parts(weight.shape[1]):
        groups = [
            _quantize_group(remaining, factor, diagonal, slice(at, min(at + fidelity.group_size, start + count)), bits)
            for at in range(start, start + count, fidelity.group_size)
        ]
        codes, scales, zeros = zip(*groups, strict=True)
        parts.append(PartCodes(torch.cat(codes, 1), torch.stack(scales), torch.stack(zeros)))
        start += count
    return QuantizedWeight.from_codes(fidelity, columns, tuple(parts))


def _quantize_group(
    remaining: Tensor, factor: Tensor, diagonal: Tensor, columns: slice, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize one group of columns and subtract its compensated errors from `remaining`, in place."""
    group = remaining[:, columns].clone()
    scale, zero = fit_grid(group, bits, diagonal[columns])
    scale, zero = scale[:, 0], zero[:, 0]
    inner = factor[columns, columns]
    pivots = inner.diagonal().tolist()
    work = group.t().contiguous()  # [columns, out]: each step touches one contiguous row
    codes, errors = torch.empty_like(work), torch.empty_like(work)
    for j, pivot in enumerate(pivots):
        codes[j] = quantize(work[j], scale, zero, bits)
        errors[j] = (work[j] - dequantize(codes[j], scale, zero)) / pivot
        work[j + 1 :].addr_(inner[j, j + 1 :], errors[j], alpha=-1)
    remaining[:, columns.stop :] -= errors.t() @ factor[columns, columns.stop :]
    return codes.t(), scale, zero
