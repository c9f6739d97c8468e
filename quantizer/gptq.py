"""Error-compensated rounding: quantize columns one after another and let later columns absorb the errors of earlier ones.

Source: GPTQ, arXiv 2210.17323, section 3, steps 2 and 3. High-impact columns come first, so that their small errors and, above all,
the large errors of the low part can still be compensated inside the low part.

Options of a fidelity: row scales are fixed before the first group is quantized, so that every grid that errors are compensated
for is the stored one. An outlier stores what has become of its weight when its column's turn comes, so it takes up
what earlier columns left over and leaves nothing but its rounding to 16 bits. An adapter is fitted to what remains at the end.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from quantizer.adapter import fit_adapter
from quantizer.fidelity import SCALE_BITS, Fidelity
from quantizer.grid import dequantize, fit_grid, half_scale, quantize
from quantizer.inverse import damped_inverse, upper_factor
from quantizer.scales import coded_scale, fit_row_scale, part_unit
from quantizer.selection import column_order
from quantizer.sparse import as_half, choose_outliers, compress_rows, output_scores
from quantizer.weight import PartCodes, QuantizedWeight


def quantize_layer(
    weight: Tensor,
    hessian: Tensor,
    fidelity: Fidelity,
    impact: Tensor,
    outlier_scores: Tensor | None = None,
    inverse: Tensor | None = None,
) -> QuantizedWeight:
    """Quantize one layer at `fidelity`, minimising the error of its outputs on the calibration inputs.

    The objective is tr((W - Q) H (W - Q)'), H being proportional to the sum of x x' over calibration inputs x.

    Args:
        weight: [out, in], finite.
        hessian: second moments of the inputs, symmetric positive semidefinite, [in, in]. All zeros, as for a layer that saw no
            input, means plain rounding.
        fidelity: how to store the layer.
        impact: score of each input column, see `quantizer.selection.column_impact`, [in].
        outlier_scores: score of each weight, the highest ones become outliers, [out, in]; by default
            `quantizer.sparse.output_scores`. Not looked at for a fidelity without outliers.
        inverse: `damped_inverse(hessian)` where it is at hand; layers with the same inputs share it.

    Returns:
        The stored form.

    Raises:
        ValueError: the moments are not finite, a score is not a number, or scores have another shape than the weight.
    """
    weight, hessian = weight.float(), hessian.float()
    if not bool(hessian.diagonal().any()):
        hessian, inverse = torch.eye(weight.shape[1], device=weight.device), None
    if inverse is None:
        inverse = damped_inverse(hessian)
    columns = column_order(impact, hessian.diagonal(), fidelity)
    diagonal, factor = hessian.diagonal()[columns], upper_factor(inverse[columns][:, columns])
    chosen = _outlier_places(weight, hessian.diagonal(), fidelity, outlier_scores)
    remaining = weight[:, columns].clone()
    ordered_chosen = None if chosen is None else chosen[:, columns]
    row_scale = None
    if fidelity.scale_bits < SCALE_BITS[0]:
        row_scale = fit_row_scale(_without(remaining, ordered_chosen), diagonal, fidelity)
    parts = _quantize_parts(remaining, factor, diagonal, fidelity, row_scale, ordered_chosen)
    outliers = None
    if chosen is not None:
        compensated = torch.empty_like(weight)
        compensated[:, columns] = remaining
        outliers = compress_rows(compensated, chosen)
    stored = QuantizedWeight.from_codes(
        replace(fidelity, adapter_rank=0), columns, parts, None if row_scale is None else row_scale[:, 0], outliers
    )
    if not fidelity.adapter_rank:
        return stored
    adapter = fit_adapter(weight - stored.dequantize(), hessian, fidelity.adapter_width(*weight.shape))
    return stored.with_adapter(fidelity.adapter_rank, adapter)


def _outlier_places(weight: Tensor, diagonal: Tensor, fidelity: Fidelity, scores: Tensor | None) -> Tensor | None:
    """Return where a layer's outliers are, bool [out, in], or None if it has none."""
    if not fidelity.outlier_share:
        return None
    if scores is None:
        scores = output_scores(weight, diagonal)
    if scores.shape != weight.shape:
        raise ValueError(
            f"outlier scores of shape {tuple(scores.shape)} for a weight of shape {tuple(weight.shape)}: give one each"
        )
    return choose_outliers(scores, fidelity.outlier_count(*weight.shape))


def _quantize_parts(
    remaining: Tensor, factor: Tensor, diagonal: Tensor, fidelity: Fidelity, row_scale: Tensor | None, chosen: Tensor | None
) -> tuple[PartCodes, ...]:
    """Quantize all columns, given in stored order.

    Args:
        remaining: the weight, overwritten by what each weight had become when its column's turn came, [out, in].
        factor: of the inverse moments, see `quantizer.inverse.upper_factor`.
        diagonal: second moment of each input, [in].
        fidelity: how to store the layer.
        row_scale: what scales are coded under, [out, 1], or None for 16-bit scales.
        chosen: where outliers are, bool [out, in], or None.
    """
    parts, start = [], 0
    for count, bits in fidelity.parts(remaining.shape[1]):
        representable = half_scale
        if row_scale is not None:
            representable = partial(coded_scale, unit=part_unit(row_scale, fidelity, bits), scale_bits=fidelity.scale_bits)
        groups = []
        for at in range(start, start + count, fidelity.group_size):
            columns = slice(at, min(at + fidelity.group_size, start + count))
            groups.append(_quantize_group(remaining, factor, diagonal, columns, bits, representable, chosen))
        codes, scales, zeros = zip(*groups, strict=True)
        parts.append(PartCodes(torch.cat(codes, 1), torch.stack(scales), torch.stack(zeros)))
        start += count
    return tuple(parts)


def _without(weight: Tensor, chosen: Tensor | None) -> Tensor:
    """Return the weight with zeros in the place of outliers: zero is on every grid, so they neither widen a range nor count."""
    return weight if chosen is None else weight.masked_fill(chosen, 0)


def _quantize_group(
    remaining: Tensor,
    factor: Tensor,
    diagonal: Tensor,
    columns: slice,
    bits: int,
    representable: Callable[[Tensor], Tensor],
    chosen: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize one group of columns and subtract its compensated errors from the later columns of `remaining`, in place."""
    group = remaining[:, columns].clone()
    kept = None if chosen is None else chosen[:, columns]
    scale, zero = fit_grid(_without(group, kept), bits, diagonal[columns], representable)
    scale, zero = scale[:, 0], zero[:, 0]
    inner = factor[columns, columns]
    work = group.t().contiguous()  # [columns, out]: each step touches one contiguous row
    codes, errors = torch.empty_like(work), torch.empty_like(work)
    steps = zip(work.unbind(), codes.unbind(), errors.unbind(), inner.unbind(), inner.diagonal().tolist(), strict=True)
    for j, (current, code, error, coupling, pivot) in enumerate(steps):
        quantize(current, scale, zero, bits, out=code)
        stored = dequantize(code, scale, zero)
        if kept is not None:
            code.copy_(torch.where(kept[:, j], zero, code))  # an exact zero: the outlier's value is added to it
            stored = torch.where(kept[:, j], as_half(current), stored)
        torch.sub(current, stored, out=error).div_(pivot)
        work[j + 1 :].addr_(coupling[j + 1 :], error, alpha=-1)
    remaining[:, columns] = work.t()
    remaining[:, columns.stop :] -= errors.t() @ factor[columns, columns.stop :]
    return codes.t(), scale, zero
