"""All fidelities of a layer side by side, while its columns are quantized."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantizer.kernels import numba_rounding
from quantizer.kernels.path import CPU, choose_kernel_path
from quantizer.packed.grid import dequantize
from quantizer.packed.outliers import round_to_float16
from quantizer.packed.weight import QuantizedWeight
from quantizer.rounding.candidate import Candidate
from quantizer.rounding.inverse import upper_factor


@dataclass(frozen=True, slots=True)
class CandidateBatch:
    """The K candidates of a layer, each in its own column order.

    A column is one contiguous row of each tensor.

    Attributes:
        candidates: the candidates.
        remaining: what each weight has become so far, [K, in, out]; columns that are done keep what
            they had become when their turn came.
        factor: factor of the inverse moments, see `quantizer.rounding.inverse.upper_factor`,
            [K, in, in].
        codes: codes of the columns that are done, [K, in, out].
        outlier_mask: where outliers are, bool [K, in, out]; None if no candidate has any.
        scale: scale of the group that each candidate is in, [K, out].
        zero: zero point of that group, [K, out].
        low: its smallest code, zero, [K, 1].
        top: its largest code, [K, 1].
    """

    candidates: Sequence[Candidate]
    remaining: Tensor
    factor: Tensor
    codes: Tensor
    outlier_mask: Tensor | None
    scale: Tensor
    zero: Tensor
    low: Tensor
    top: Tensor

    @classmethod
    def of(
        cls, weight: Tensor, inverse: Tensor, candidates: Sequence[Candidate]
    ) -> "CandidateBatch":
        """Start from the unquantized weight.

        Args:
            weight: float32 [out, in].
            inverse: damped inverse of the second moments, [in, in].
            candidates: the candidates.
        """
        out_features, in_features = weight.shape
        remaining = weight.new_empty(len(candidates), in_features, out_features)
        factor = weight.new_empty(len(candidates), in_features, in_features)
        transposed = weight.t().contiguous()
        for index, candidate in enumerate(candidates):
            torch.index_select(transposed, 0, candidate.columns, out=remaining[index])
            factor[index] = upper_factor(inverse, candidate.columns)
        scale = torch.ones_like(remaining[:, 0])
        low = torch.zeros_like(scale[:, :1])
        return cls(
            candidates=candidates,
            remaining=remaining,
            factor=factor,
            codes=torch.empty_like(remaining),
            outlier_mask=_outlier_mask(weight, candidates),
            scale=scale,
            zero=torch.zeros_like(scale),
            low=low,
            top=low.clone(),
        )

    def fit_grids(self, start: int) -> None:
        """Fit the grid of each candidate that has a group starting at column `start`."""
        for index, candidate in enumerate(self.candidates):
            grid = candidate.fit_grid(start, self.remaining[index])
            if grid is not None:
                self.scale[index] = grid.scale
                self.zero[index] = grid.zero
                self.top[index] = grid.top

    def quantize_columns(self, columns: slice) -> None:
        """Quantize some columns, and let all later columns absorb their errors."""
        compensate = self._compensate
        is_on_cpu = choose_kernel_path(self.remaining.device.type).name == CPU
        if self.outlier_mask is None and is_on_cpu:
            compensate = self._compensate_compiled
        errors = compensate(columns)
        self.remaining[:, columns.stop :].baddbmm_(
            self.factor[:, columns, columns.stop :].transpose(1, 2), errors, alpha=-1
        )

    def finish(self) -> list[QuantizedWeight]:
        """Return the quantized layers, without adapters, once all columns are quantized."""
        return [
            candidate.finish(self.codes[index].t(), self.remaining[index].t())
            for index, candidate in enumerate(self.candidates)
        ]

    def _compensate(self, columns: slice) -> Tensor:
        """Quantize some columns one after the other, each compensated by those that follow.

        Returns:
            Their errors divided by their pivots, [K, columns, out].
        """
        work = self.remaining[:, columns].clone()
        codes = self.codes[:, columns]
        factor = self.factor[:, columns, columns]
        pivots = factor.diagonal(dim1=1, dim2=2)
        errors = torch.empty_like(work)
        for at in range(work.shape[1]):
            current = work[:, at]
            code = codes[:, at]
            error = errors[:, at]
            torch.div(current, self.scale, out=code).add_(self.zero).round_()
            code.clamp_(self.low, self.top)
            stored = dequantize(code, self.scale, self.zero)
            if self.outlier_mask is not None:
                mask = self.outlier_mask[:, columns][:, at]
                # the code of an outlier stands for zero: the outlier's value is added to it
                code.copy_(torch.where(mask, self.zero, code))
                stored = torch.where(mask, round_to_float16(current), stored)
            torch.sub(current, stored, out=error).div_(pivots[:, at : at + 1])
            work[:, at + 1 :].addcmul_(factor[:, at, at + 1 :, None], error[:, None], value=-1)
        self.remaining[:, columns] = work
        return errors

    def _compensate_compiled(self, columns: slice) -> Tensor:
        """Do the same as `_compensate` with compiled loops, one candidate after the other."""
        errors = torch.empty_like(self.remaining[:, columns])
        tensors = (
            self.remaining[:, columns],
            self.factor[:, columns, columns].contiguous(),
            self.scale,
            self.zero,
            self.top[:, 0],
            self.codes[:, columns],
            errors,
        )
        for arrays in zip(*(tensor.numpy() for tensor in tensors), strict=True):
            numba_rounding.compensate(*arrays)
        return errors


def _outlier_mask(weight: Tensor, candidates: Sequence[Candidate]) -> Tensor | None:
    """Return where the outliers of all candidates are, bool [K, in, out]; None if none has any."""
    masks = [candidate.outlier_mask for candidate in candidates]
    if all(mask is None for mask in masks):
        return None
    no_outliers = torch.zeros_like(weight, dtype=torch.bool)
    return torch.stack([(no_outliers if mask is None else mask).t() for mask in masks])
