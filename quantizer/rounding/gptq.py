"""Error-compensated rounding.

Quantize columns one after another and let later columns absorb the errors of earlier ones.

Source: GPTQ, arXiv 2210.17323, section 3, steps 2 and 3. High-impact columns come first, so that
their small errors and, above all, the large errors of the low part can still be compensated inside
the low part.

Several fidelities of a layer are quantized at once: each step, small as it is, then serves all of
them. On a processor compiled loops take the steps of one after those of another, and the products
with later columns serve all.

Options of a fidelity: row scales are fixed before the first group is quantized, so that every grid
that errors are compensated for is the stored one. An outlier stores what has become of its weight
when its column's turn comes, so it takes up what earlier columns left over and leaves nothing but
its rounding to 16 bits. An adapter is fitted to what remains at the end.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from quantizer.kernels import numba_rounding
from quantizer.kernels.path import CPU, choose_kernel_path
from quantizer.packed.adapter import fit_adapter
from quantizer.packed.grid import dequantize, round_scale_to_float16
from quantizer.packed.outliers import (
    choose_outliers,
    compress_rows,
    output_error_scores,
    round_to_float16,
)
from quantizer.packed.scales import quantize_scale, scale_unit
from quantizer.packed.weight import PartCodes, QuantizedWeight
from quantizer.plans.fidelity import COLUMN_MULTIPLE, SCALE_BITS, Fidelity
from quantizer.rounding.columns import column_order
from quantizer.rounding.grids import fit_grid, fit_row_scale
from quantizer.rounding.inverse import damped_inverse, upper_factor


def gptq_layer(
    weight: Tensor,
    hessian: Tensor,
    fidelity: Fidelity,
    impact: Tensor,
    outlier_scores: Tensor | None = None,
    inverse: Tensor | None = None,
) -> QuantizedWeight:
    """Quantize one layer at one fidelity, see `gptq_candidates`."""
    (stored,) = gptq_candidates(weight, hessian, (fidelity,), (impact,), outlier_scores, inverse)
    return stored


def gptq_candidates(
    weight: Tensor,
    hessian: Tensor,
    fidelities: Sequence[Fidelity],
    impacts: Sequence[Tensor],
    outlier_scores: Tensor | None = None,
    inverse: Tensor | None = None,
) -> list[QuantizedWeight]:
    """Quantize one layer at each of some fidelities, minimising the error of its outputs on the calibration inputs.

    The objective is tr((W - Q) H (W - Q)'), H being proportional to the sum of x x' over
    calibration inputs x. Memory: 12 bytes for each weight and fidelity, and 4 bytes for each pair
    of columns and fidelity.

    Args:
        weight: [out, in], finite.
        hessian: second moments of the inputs, symmetric positive semidefinite, [in, in]. All zeros,
            as for a layer that saw no input, means plain rounding.
        fidelities: how to store the layer.
        impacts: for each fidelity the score of each input column, see
            `quantizer.rounding.columns.column_impact`, [in].
        outlier_scores: score of each weight, the highest ones become outliers, [out, in]; by
            default `quantizer.packed.outliers.output_error_scores`. Not looked at for a fidelity without outliers.
        inverse: `damped_inverse(hessian)` where it is at hand; layers with the same inputs share
            it.

    Returns:
        The stored forms, in the order of the fidelities.

    Raises:
        ValueError: the moments are not finite, a score is not a number, or scores have another
            shape than the weight.
    """
    weight, hessian = weight.float(), hessian.float()
    if not bool(hessian.diagonal().any()):
        hessian, inverse = torch.eye(weight.shape[1], device=weight.device), None
    if inverse is None:
        inverse = damped_inverse(hessian)
    forms = [
        _Form.begin(weight, hessian.diagonal(), fidelity, impact, outlier_scores)
        for fidelity, impact in zip(fidelities, impacts, strict=True)
    ]
    stack = _Stack.of(weight, inverse, forms)
    for start in range(0, weight.shape[1], COLUMN_MULTIPLE):
        for at, form in enumerate(forms):
            form.enter(start, at, stack)
        stack.quantize_columns(slice(start, min(start + COLUMN_MULTIPLE, weight.shape[1])))
    found = [
        form.finish(stack.codes[at].t(), stack.remaining[at].t()) for at, form in enumerate(forms)
    ]
    return [
        _with_adapter(stored, weight, hessian, fidelity)
        for stored, fidelity in zip(found, fidelities, strict=True)
    ]


def _with_adapter(
    stored: QuantizedWeight, weight: Tensor, hessian: Tensor, fidelity: Fidelity
) -> QuantizedWeight:
    if not fidelity.adapter_rank:
        return stored
    adapter = fit_adapter(
        weight - stored.dequantize(), hessian, fidelity.stored_adapter_rank(*weight.shape)
    )
    return stored.with_adapter(fidelity.adapter_rank, adapter)


@dataclass(frozen=True, slots=True)
class _Form:
    """What one fidelity adds to the common steps.

    Attributes:
        fidelity: which.
        columns: its column order, [in].
        diagonal: second moment of each input in that order, [in].
        chosen: where outliers are, in that order, bool [out, in], or None.
        row_scale: what scales are coded under, [out, 1], or None for 16-bit scales.
        groups: its groups by their first column: the column behind the last, and the code width.
        grids: scale and zero point of the groups so far, [out] each.
    """

    fidelity: Fidelity
    columns: Tensor
    diagonal: Tensor
    chosen: Tensor | None
    row_scale: Tensor | None
    groups: dict[int, tuple[int, int]]
    grids: list[tuple[Tensor, Tensor]]

    @classmethod
    def begin(
        cls,
        weight: Tensor,
        diagonal: Tensor,
        fidelity: Fidelity,
        impact: Tensor,
        scores: Tensor | None,
    ) -> "_Form":
        """Settle the column order, the outliers and the row scales of a fidelity."""
        columns = column_order(impact, diagonal, fidelity)
        chosen, row_scale = _outlier_places(weight, diagonal, fidelity, scores), None
        chosen = None if chosen is None else chosen[:, columns]
        if fidelity.scale_bits < SCALE_BITS[0]:
            row_scale = fit_row_scale(
                _without(weight[:, columns], chosen), diagonal[columns], fidelity
            )
        groups, start = {}, 0
        for count, bits in fidelity.parts(weight.shape[1]):
            for at in range(start, start + count, fidelity.group_size):
                groups[at] = min(at + fidelity.group_size, start + count), bits
            start += count
        return cls(fidelity, columns, diagonal[columns], chosen, row_scale, groups, [])

    def enter(self, start: int, at: int, stack: "_Stack") -> None:
        """Fit the grid of the group that begins at a column, if one does, to what has remained of it."""
        if start not in self.groups:
            return
        stop, bits = self.groups[start]
        remaining = stack.remaining[at, start:stop].t()
        if self.chosen is not None:
            remaining = _without(remaining, self.chosen[:, start:stop])
        scale, zero = fit_grid(
            remaining, bits, self.diagonal[start:stop], self._representable(bits)
        )
        stack.scale[at], stack.zero[at], stack.top[at] = scale[:, 0], zero[:, 0], 2**bits - 1
        self.grids.append((scale[:, 0], zero[:, 0]))

    def _representable(self, bits: int) -> Callable[[Tensor], Tensor]:
        if self.row_scale is None:
            return round_scale_to_float16
        return partial(
            quantize_scale,
            unit=scale_unit(self.row_scale, self.fidelity, bits),
            scale_bits=self.fidelity.scale_bits,
        )

    def finish(self, codes: Tensor, remaining: Tensor) -> QuantizedWeight:
        """Return the stored form, without an adapter.

        Args:
            codes: of all columns, [out, in].
            remaining: what each weight had become when its column's turn came, [out, in].
        """
        parts, start, grids = [], 0, iter(self.grids)
        for count, _ in self.fidelity.parts(codes.shape[1]):
            scales, zeros = zip(
                *(next(grids) for _ in range(0, count, self.fidelity.group_size)), strict=True
            )
            parts.append(
                PartCodes(codes[:, start : start + count], torch.stack(scales), torch.stack(zeros))
            )
            start += count
        outliers = None
        if self.chosen is not None:
            compensated, chosen = torch.empty_like(remaining), torch.empty_like(self.chosen)
            compensated[:, self.columns], chosen[:, self.columns] = remaining, self.chosen
            outliers = compress_rows(compensated, chosen)
        row_scale = None if self.row_scale is None else self.row_scale[:, 0]
        return QuantizedWeight.from_codes(
            replace(self.fidelity, adapter_rank=0), self.columns, tuple(parts), row_scale, outliers
        )


@dataclass(frozen=True, slots=True)
class _Stack:
    """All fidelities side by side, each in its own column order.

    Every column is one contiguous row.

    Attributes:
        remaining: the weight; columns that are done hold what they had become when their turn came,
            [K, in, out].
        factor: of the inverse moments, see `quantizer.rounding.inverse.upper_factor`, [K, in, in].
        codes: of the columns that are done, [K, in, out].
        chosen: where outliers are, bool [K, in, out], or None if no fidelity has any.
        scale: of the group that each fidelity is in, [K, out].
        zero: its zero point, [K, out].
        low: its smallest code, zero, [K, 1].
        top: its largest code, [K, 1].
    """

    remaining: Tensor
    factor: Tensor
    codes: Tensor
    chosen: Tensor | None
    scale: Tensor
    zero: Tensor
    low: Tensor
    top: Tensor

    @classmethod
    def of(cls, weight: Tensor, inverse: Tensor, forms: Sequence[_Form]) -> "_Stack":
        """Begin with the whole weight."""
        out_features, in_features = weight.shape
        remaining = weight.new_empty(len(forms), in_features, out_features)
        factor, transposed, chosen = (
            weight.new_empty(len(forms), in_features, in_features),
            weight.t().contiguous(),
            None,
        )
        for at, form in enumerate(forms):
            torch.index_select(transposed, 0, form.columns, out=remaining[at])
            factor[at] = upper_factor(inverse, form.columns)
        if any(form.chosen is not None for form in forms):
            none = torch.zeros_like(weight, dtype=torch.bool)
            chosen = torch.stack(
                [(none if form.chosen is None else form.chosen).t() for form in forms]
            )
        scale = torch.ones_like(remaining[:, 0])
        low = torch.zeros_like(scale[:, :1])
        return cls(
            remaining,
            factor,
            torch.empty_like(remaining),
            chosen,
            scale,
            torch.zeros_like(scale),
            low,
            low.clone(),
        )

    def quantize_columns(self, columns: slice) -> None:
        """Quantize some columns, and let all later ones absorb their errors."""
        compensate = self._compensate
        if self.chosen is None and choose_kernel_path(self.remaining.device.type).name == CPU:
            compensate = self._compensate_compiled
        errors = compensate(columns)
        self.remaining[:, columns.stop :].baddbmm_(
            self.factor[:, columns, columns.stop :].transpose(1, 2), errors, alpha=-1
        )

    def _compensate_compiled(self, columns: slice) -> Tensor:
        """Do what `_compensate` does, one fidelity after the other."""
        errors = torch.empty_like(self.remaining[:, columns])
        inner, tops = self.factor[:, columns, columns].contiguous().numpy(), self.top[:, 0].numpy()
        arrays = [
            each.numpy()
            for each in (
                self.remaining[:, columns],
                self.scale,
                self.zero,
                self.codes[:, columns],
                errors,
            )
        ]
        for factor, top, remaining, scale, zero, codes, left in zip(
            inner, tops, *arrays, strict=True
        ):
            numba_rounding.compensate(remaining, factor, scale, zero, top, codes, left)
        return errors

    def _compensate(self, columns: slice) -> Tensor:
        """Quantize some columns one after the other.

        Return their errors divided by their pivots, [K, columns, out].
        """
        work, codes = self.remaining[:, columns].clone(), self.codes[:, columns]
        inner, errors = self.factor[:, columns, columns], torch.empty_like(work)
        pivots = inner.diagonal(dim1=1, dim2=2)
        for at in range(work.shape[1]):
            current, code, error = work[:, at], codes[:, at], errors[:, at]
            torch.div(current, self.scale, out=code).add_(self.zero).round_().clamp_(
                self.low, self.top
            )
            stored = dequantize(code, self.scale, self.zero)
            if self.chosen is not None:
                kept = self.chosen[:, columns][:, at]
                code.copy_(
                    torch.where(kept, self.zero, code)
                )  # an exact zero: the outlier's value is added to it
                stored = torch.where(kept, round_to_float16(current), stored)
            torch.sub(current, stored, out=error).div_(pivots[:, at : at + 1])
            work[:, at + 1 :].addcmul_(inner[:, at, at + 1 :, None], error[:, None], value=-1)
        self.remaining[:, columns] = work
        return errors


def _outlier_places(
    weight: Tensor, diagonal: Tensor, fidelity: Fidelity, scores: Tensor | None
) -> Tensor | None:
    """Return where a layer's outliers are, bool [out, in], or None if it has none."""
    if not fidelity.outlier_share:
        return None
    if scores is None:
        scores = output_error_scores(weight, diagonal)
    if scores.shape != weight.shape:
        raise ValueError(
            f"outlier scores of shape {tuple(scores.shape)} for a weight of shape "
            f"{tuple(weight.shape)}: give one each"
        )
    return choose_outliers(scores, fidelity.outlier_count(*weight.shape))


def _without(weight: Tensor, chosen: Tensor | None) -> Tensor:
    """Return the weight with zeros in the place of outliers.

    Zero is on every grid, so they neither widen a range nor count.
    """
    return weight if chosen is None else weight.masked_fill(chosen, 0)
