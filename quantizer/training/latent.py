"""A quantized linear layer in a form that gradients can change: latent codes and scales.

Zero points and column order stay.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quantizer.packed.adapter import Adapter, adapter_weight
from quantizer.packed.grid import FLOAT16_MAX, FLOAT16_SMALLEST_NORMAL
from quantizer.packed.layout import COLUMNS, named_parts
from quantizer.packed.outliers import Outliers, add_outliers
from quantizer.packed.scales import scale_unit
from quantizer.packed.weight import PartCodes, QuantizedWeight

HALF = 0.5
"""How far from a code a latent code rounds to another one."""
CELL = 0.48
"""How far from its stored code a latent code may start.

Where codes may flip at once too many do, and where they must first come a
long way the scales learn alone: tests/benchmarks/LOG.md has what was compared."""


class LatentLinear(nn.Module):
    """A linear layer whose weight is scale * (round(latent code) - zero), differentiable in latent codes and scales.

    Rounding passes gradients on as if it were the identity, and none where the latent code is off
    the grid by more than half a step (the straight-through estimator of arXiv 1308.3432, section 4,
    with the clipped gradient of arXiv 1902.08153). Scales have their true gradient; where they are
    stored in few bits they are rounded in the same manner. Outliers stay as they are. An adapter is
    trained in full. Training all of this against a loss is what arXiv 2407.11062, section 3.2, does
    block by block.

    Attributes:
        columns: input column at each stored position, int64 [in].
        places: where each input column is in stored order, int64 [in].
        kept: where outliers are, bool [out, in]; None if there are none.
        outlying: their values, zero elsewhere, float32 [out, in]; None if there are none.
        adapter_a: float32 [rank, in]; None if there is no adapter.
        adapter_b: float32 [out, rank]; None if there is no adapter.
    """

    columns: Tensor
    places: Tensor
    kept: Tensor | None
    outlying: Tensor | None
    adapter_a: nn.Parameter | None
    adapter_b: nn.Parameter | None

    def __init__(
        self, linear: nn.Linear, stored: QuantizedWeight, *, clipping: bool = False
    ) -> None:
        """Start from a stored form of `linear`, with latent codes as near to its weight as the stored codes allow.

        The layer then computes just what the stored form does; a latent code whose weight lies
        between two stored codes is near the border, and so the first to change.

        Args:
            linear: the original layer.
            stored: what it was quantized to.
            clipping: whether codes follow from the scales, see `ClippedPart`.
        """
        super().__init__()
        stored = stored.to(linear.weight.device)
        self._fidelity = stored.fidelity
        self.register_buffer("columns", stored.tensors[COLUMNS].to(torch.int64))
        self.register_buffer("places", self.columns.argsort())
        self.bias = linear.bias
        weight = linear.weight.data.float()
        adapter, self._outliers, self._row_scale = stored.adapter, stored.outliers, stored.row_scale
        self.adapter_a = nn.Parameter(adapter.a.float()) if adapter else None
        self.adapter_b = nn.Parameter(adapter.b.float()) if adapter else None
        self._set_outliers(weight)
        if adapter is not None:
            weight = weight - adapter_weight(adapter)
        ordered, self._parts, start = weight[:, self.columns], nn.ModuleList(), 0
        for (_, columns, bits), part in zip(
            named_parts(stored.fidelity, stored.in_features), stored.parts(), strict=True
        ):
            row_unit = (
                None
                if self._row_scale is None
                else scale_unit(self._row_scale, stored.fidelity, bits)
            )
            group_size, top = stored.fidelity.group_size, 2**stored.fidelity.scale_bits - 1
            make = ClippedPart if clipping else LatentPart
            self._parts.append(
                make(ordered[:, start : start + columns], part, bits, group_size, row_unit, top)
            )
            start += columns

    def _set_outliers(self, weight: Tensor) -> None:
        kept = outlying = None
        if self._outliers is not None:
            outlying, ones = torch.zeros_like(weight), torch.zeros_like(weight)
            add_outliers(outlying, self._outliers)
            add_outliers(
                ones,
                Outliers(
                    torch.ones_like(self._outliers.values),
                    self._outliers.columns,
                    self._outliers.starts,
                ),
            )
            kept = ones.bool()
        self.register_buffer("kept", kept)
        self.register_buffer("outlying", outlying)

    @property
    def parts(self) -> list["LatentPart"]:
        """The parts in stored order."""
        return [part for part in self._parts if isinstance(part, LatentPart)]

    def adapters(self) -> dict[str, nn.Parameter]:
        """The factors of the adapter by name; none where there is no adapter."""
        named = {"adapter_a": self.adapter_a, "adapter_b": self.adapter_b}
        return {name: factor for name, factor in named.items() if factor is not None}

    def grid_weight(self) -> Tensor:
        """Return the weight without the adapter, float32 [out, in], differentiable."""
        stored = torch.cat([part.weight() for part in self.parts], 1)
        weight: Tensor = _Reorder.apply(stored, self.places, self.columns)  # type: ignore[no-untyped-call]
        if self.kept is not None and self.outlying is not None:
            weight = torch.where(self.kept, self.outlying, weight)
        return weight

    def weight(self) -> Tensor:
        """Return the weight that the layer has now, float32 [out, in], differentiable."""
        weight = self.grid_weight()
        if self.adapter_a is not None and self.adapter_b is not None:
            weight = weight + self.adapter_b @ self.adapter_a
        return weight

    @torch.no_grad()
    def stored(self) -> QuantizedWeight:
        """Return the stored form of the layer as it is now.

        Scales and adapters are rounded to 16 bits.
        """
        parts, start = [], 0
        for part in self.parts:
            found = part.codes()
            if self.kept is not None:
                kept = self.kept[:, self.columns][:, start : start + found.codes.shape[1]]
                zero = found.zero.t().repeat_interleave(self._fidelity.group_size, 1)[
                    :, : kept.shape[1]
                ]
                found = replace(found, codes=torch.where(kept, zero, found.codes))
            parts.append(found)
            start += found.codes.shape[1]
        bare = replace(self._fidelity, adapter_rank=0)
        weight = QuantizedWeight.from_codes(
            bare, self.columns, tuple(parts), self._row_scale, self._outliers
        )
        if self.adapter_a is None or self.adapter_b is None:
            return weight
        return weight.with_adapter(
            self._fidelity.adapter_rank, Adapter(self.adapter_a.half(), self.adapter_b.half())
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return hidden_states @ W' + bias; [..., in] to [..., out]."""
        weight = self.weight()
        if not torch.is_autocast_enabled(weight.device.type):
            weight = weight.to(hidden_states.dtype)
        return nn.functional.linear(hidden_states, weight, self.bias)


class LatentPart(nn.Module):
    """One part of a latent layer: the columns that share a code width.

    Attributes:
        bits: width of the codes.
        latent: codes before rounding, float32 [out, groups, group size], the last group padded with
            columns that are not used.
        factor: what multiplies the scales, 1 at the start, float32 [out, groups, 1].
        scale: the stored scales, float32 [out, groups, 1].
        zero: zero points, integers as floats, [out, groups, 1].
        unit: what the code of a scale counts, float32 [out, 1, 1]; None where scales have 16 bits.
    """

    latent: nn.Parameter
    factor: nn.Parameter
    scale: Tensor
    zero: Tensor
    unit: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        part: PartCodes,
        bits: int,
        group_size: int,
        row_unit: Tensor | None = None,
        scale_top: int = 0,
    ) -> None:
        """Start from the codes of a part.

        Args:
            weight: what the codes stand for, float32 [out, columns].
            part: the codes.
            bits: their width.
            group_size: columns that share a scale.
            row_unit: what the code of a scale counts, [out], or None.
            scale_top: the largest such code.
        """
        super().__init__()
        self.bits, self._columns, self._top, self._scale_top = (
            bits,
            weight.shape[1],
            2**bits - 1,
            scale_top,
        )
        scale, zero, codes = part.scale, part.zero, part.codes
        self.register_buffer("scale", scale.t().unsqueeze(-1).contiguous())  # [out, groups, 1]
        self.register_buffer("zero", zero.t().unsqueeze(-1).contiguous())
        self.register_buffer("unit", None if row_unit is None else row_unit.view(-1, 1, 1))
        padding = (0, -weight.shape[1] % group_size)
        shape = (weight.shape[0], -1, group_size)
        codes = nn.functional.pad(codes, padding).view(shape)
        exact = nn.functional.pad(weight, padding).view(shape) / self.scale + self.zero
        self.latent = nn.Parameter(exact.clamp(codes - CELL, codes + CELL))
        self.factor = nn.Parameter(torch.ones_like(self.scale))

    def scales(self) -> Tensor:
        """Return the scales as they are now, float32 [out, groups, 1], differentiable."""
        scale = self.factor * self.scale
        if self.unit is None:
            return scale
        codes: Tensor = _Round.apply(scale / self.unit, 1, self._scale_top)  # type: ignore[no-untyped-call]
        return self.unit * codes

    def exact(self) -> Tensor:
        """Return the codes before they are rounded, float32 [out, groups, group size], differentiable."""
        return self.latent

    def weight(self) -> Tensor:
        """Return the part's weight, float32 [out, columns], differentiable."""
        weight: Tensor = _Dequantize.apply(self.exact(), self.scales(), self.zero, self._top)  # type: ignore[no-untyped-call]
        return weight.flatten(1)[:, : self._columns]

    @torch.no_grad()
    def codes(self) -> PartCodes:
        """Return the part's codes as they are now, with scales that can be stored."""
        scale = self.scales()
        if self.unit is None:
            scale = scale.clamp(FLOAT16_SMALLEST_NORMAL, FLOAT16_MAX).half().float()
        codes = self.exact().round().clamp(0, self._top).flatten(1)[:, : self._columns]
        return PartCodes(
            codes, scale.squeeze(-1).t().contiguous(), self.zero.squeeze(-1).t().contiguous()
        )


class ClippedPart(LatentPart):
    """A part whose codes follow from its scales.

    Each weight rounded to the nearest on a grid of learned range.

    What is rounded is the weight as far as it lies in the cell of its stored code, else the border
    of that cell: so training starts from the stored codes, and where those make good the errors of
    others it does not give that up. Plain rounding of the weights is a start that few steps do not
    make up for: tests/benchmarks/LOG.md.

    The gradient in a scale is the one of LSQ (arXiv 1902.08153, section 2.1): what rounding changed
    a weight by, in codes, or the code itself where the weight is clipped. OmniQuant (arXiv
    2308.13137, section 3.2) and ApiQ learn a factor for each end of the range; here one serves
    both, as zero points stay.
    """

    def __init__(self, weight: Tensor, *rest: Any) -> None:
        """Take the latent codes as weights in units of the scale that they start from, and leave them there."""
        super().__init__(weight, *rest)
        self.latent = nn.Parameter(self.latent.data - self.zero, requires_grad=False)

    def exact(self) -> Tensor:
        """Return weight / scale + zero point."""
        return self.latent / self.factor + self.zero


class _Round(torch.autograd.Function):
    """clamp(round(value), low, top), with the gradient of clamp(value, low - 0.5, top + 0.5)."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, low: int, top: int) -> Tensor:
        """Return whole numbers as floats."""
        ctx.save_for_backward(_inside(value, low, top))
        return value.round().clamp_(low, top)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient in the values."""
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None


def _inside(value: Tensor, low: int, top: int) -> Tensor:
    """Return where values are off the grid by no more than half a step."""
    return (value >= low - HALF) & (value <= top + HALF)


class _Dequantize(torch.autograd.Function):
    """(clamp(round(code), 0, top) - zero) * scale, with the gradient of `_Round` in the codes and the true one in the scales.

    Codes are rounded again on the way back: to keep them would take as much memory as the weights.
    """

    @staticmethod
    def forward(ctx: Any, exact: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
        """Return the weights, in the shape of the codes."""
        ctx.save_for_backward(exact, scale, zero)
        ctx.top = top
        return exact.round().clamp_(0, top).sub_(zero).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Return the gradients in codes and scales."""
        (gradient,), (exact, scale, zero) = gradients, ctx.saved_tensors
        in_codes = in_scale = None
        if ctx.needs_input_grad[0]:
            in_codes = (gradient * scale).mul_(_inside(exact, 0, ctx.top))
        if ctx.needs_input_grad[1]:
            in_scale = (
                exact.round().clamp_(0, ctx.top).sub_(zero).mul_(gradient).sum(-1, keepdim=True)
            )
        return in_codes, in_scale, None, None


class _Reorder(torch.autograd.Function):
    """The columns in another order.

    On the way back by the inverse order, as adding at places is many times slower.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        """Return column order[k] as column k."""
        ctx.save_for_backward(inverse)
        return weight.index_select(1, order)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient in the columns where they were."""
        (inverse,) = ctx.saved_tensors
        return gradients[0].index_select(1, inverse), None, None
