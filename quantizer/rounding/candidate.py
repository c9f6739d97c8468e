"""One fidelity of a layer while the layer's columns are quantized one after another."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from quantizer.packed.grid import round_scale_to_float16
from quantizer.packed.outliers import choose_outliers, compress_rows, output_error_scores
from quantizer.packed.scales import quantize_scale, scale_unit
from quantizer.packed.weight import PartCodes, QuantizedWeight
from quantizer.plans.fidelity import SCALE_BITS, Fidelity
from quantizer.rounding.columns import column_order
from quantizer.rounding.grids import fit_grid
from quantizer.rounding.row_scales import fit_row_scale


@dataclass(frozen=True, slots=True)
class Group:
    """A group of columns that share a grid.

    Attributes:
        stop: position after the group's last column, in stored order.
        bits: code width.
    """

    stop: int
    bits: int


@dataclass(frozen=True, slots=True)
class Grid:
    """The grid of one group.

    Attributes:
        scale: float32 [out].
        zero: zero points, whole numbers as floats, [out].
        top: the largest code.
    """

    scale: Tensor
    zero: Tensor
    top: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layer that is being quantized at one fidelity.

    Attributes:
        fidelity: how the layer is stored.
        columns: the column order, [in]. All that follows is in this order.
        diagonal: second moment of each input, [in].
        outlier_mask: where outliers are, bool [out, in]; None if there are none.
        row_scale: row scales under which scales are coded, [out, 1]; None for 16-bit scales.
        groups: groups by the position of their first column.
        grids: grids of the groups that have been fitted so far.
    """

    fidelity: Fidelity
    columns: Tensor
    diagonal: Tensor
    outlier_mask: Tensor | None
    row_scale: Tensor | None
    groups: dict[int, Group]
    grids: list[Grid]

    @classmethod
    def prepare(
        cls,
        weight: Tensor,
        diagonal: Tensor,
        fidelity: Fidelity,
        impact: Tensor,
        outlier_scores: Tensor | None,
    ) -> "Candidate":
        """Fix the column order, the outliers and the row scales of a fidelity.

        Args:
            weight: float32 [out, in].
            diagonal: second moment of each input, [in].
            fidelity: how the layer is stored.
            impact: score of each input column, [in].
            outlier_scores: score of each weight, [out, in]; None for the default.
        """
        columns = column_order(impact, diagonal, fidelity)
        outlier_mask = _outlier_mask(weight, diagonal, fidelity, outlier_scores)
        if outlier_mask is not None:
            outlier_mask = outlier_mask[:, columns]
        row_scale = None
        if fidelity.scale_bits < SCALE_BITS[0]:
            dense = _without_outliers(weight[:, columns], outlier_mask)
            row_scale = fit_row_scale(dense, diagonal[columns], fidelity)
        groups = _groups(fidelity, weight.shape[1])
        return cls(fidelity, columns, diagonal[columns], outlier_mask, row_scale, groups, [])

    def fit_grid(self, start: int, remaining: Tensor) -> Grid | None:
        """Fit and record the grid of the group that starts at a column, if one starts there.

        Args:
            start: position of the column, in stored order.
            remaining: what each weight has become so far, [in, out], in stored order.
        """
        group = self.groups.get(start)
        if group is None:
            return None
        columns = slice(start, group.stop)
        weight = remaining[columns].t()
        if self.outlier_mask is not None:
            weight = _without_outliers(weight, self.outlier_mask[:, columns])
        representable = self._representable(group.bits)
        scale, zero = fit_grid(weight, group.bits, self.diagonal[columns], representable)
        grid = Grid(scale[:, 0], zero[:, 0], 2**group.bits - 1)
        self.grids.append(grid)
        return grid

    def _representable(self, bits: int) -> Callable[[Tensor], Tensor]:
        """Return the function that rounds scales to ones that can be stored."""
        if self.row_scale is None:
            return round_scale_to_float16
        unit = scale_unit(self.row_scale, self.fidelity, bits)
        return partial(quantize_scale, unit=unit, scale_bits=self.fidelity.scale_bits)

    def finish(self, codes: Tensor, remaining: Tensor) -> QuantizedWeight:
        """Return the quantized layer, without an adapter.

        Args:
            codes: of all columns, [out, in], in stored order.
            remaining: what each weight had become when its column's turn came, of the same shape.
        """
        parts = []
        start = 0
        grids = iter(self.grids)
        for count, _ in self.fidelity.parts(codes.shape[1]):
            own = [next(grids) for _ in range(0, count, self.fidelity.group_size)]
            scales = torch.stack([grid.scale for grid in own])
            zeros = torch.stack([grid.zero for grid in own])
            parts.append(PartCodes(codes[:, start : start + count], scales, zeros))
            start += count
        outliers = None
        if self.outlier_mask is not None:
            values = torch.empty_like(remaining)
            values[:, self.columns] = remaining
            mask = torch.empty_like(self.outlier_mask)
            mask[:, self.columns] = self.outlier_mask
            outliers = compress_rows(values, mask)
        row_scale = None if self.row_scale is None else self.row_scale[:, 0]
        return QuantizedWeight.from_codes(
            replace(self.fidelity, adapter_rank=0), self.columns, tuple(parts), row_scale, outliers
        )


def _groups(fidelity: Fidelity, in_features: int) -> dict[int, Group]:
    groups = {}
    start = 0
    for count, bits in fidelity.parts(in_features):
        for first in range(start, start + count, fidelity.group_size):
            groups[first] = Group(min(first + fidelity.group_size, start + count), bits)
        start += count
    return groups


def _outlier_mask(
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
            f"{tuple(weight.shape)}: give one for each weight"
        )
    return choose_outliers(scores, fidelity.outlier_count(*weight.shape))


def _without_outliers(weight: Tensor, outlier_mask: Tensor | None) -> Tensor:
    """Return the weight with zeros in the place of outliers.

    Zero is on every grid, so outliers then neither widen the range of a grid nor add to its error.
    """
    return weight if outlier_mask is None else weight.masked_fill(outlier_mask, 0)
