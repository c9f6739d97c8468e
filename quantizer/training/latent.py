"""A quantized linear layer whose codes and scales can be trained by gradient descent.

Zero points and column order stay as they are.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from quantizer.packed.adapter import Adapter, adapter_weight
from quantizer.packed.layout import COLUMNS, named_parts
from quantizer.packed.outliers import Outliers, add_outliers
from quantizer.packed.scales import scale_unit
from quantizer.packed.weight import QuantizedWeight
from quantizer.training.latent_part import ClippedPart, LatentPart
from quantizer.training.straight_through import Reorder


class LatentLinear(nn.Module):
    """A linear layer with the weight scale * (round(latent code) - zero).

    It is differentiable in latent codes and scales. Rounding has the gradient of the identity, and
    none where the latent code is off the grid by more than half a step (the straight-through
    estimator of arXiv 1308.3432, section 4, with the clipped gradient of arXiv 1902.08153). The
    gradient in the scales is exact; scales that are stored in few bits are rounded in the same
    manner as codes. Outliers stay as they are. An adapter is trained in full. Training all of this
    against a loss is what arXiv 2407.11062, section 3.2, does block by block.

    Attributes:
        columns: input column at each stored position, int64 [in].
        positions: stored position of each input column, int64 [in].
        outlier_mask: where outliers are, bool [out, in]; None if there are none.
        outlier_values: their values, zero elsewhere, float32 [out, in]; None if there are none.
        adapter_a: float32 [rank, in]; None if there is no adapter.
        adapter_b: float32 [out, rank]; None if there is no adapter.
    """

    columns: Tensor
    positions: Tensor
    outlier_mask: Tensor | None
    outlier_values: Tensor | None
    adapter_a: nn.Parameter | None
    adapter_b: nn.Parameter | None

    def __init__(
        self, linear: nn.Linear, quantized: QuantizedWeight, *, clipping: bool = False
    ) -> None:
        """Start from a quantized layer, with latent codes as near to the original as possible.

        The layer then computes exactly what the quantized layer does. A latent code whose original
        weight lies between two codes is near the border of its code, so it changes first.

        Args:
            linear: the original layer.
            quantized: the quantized layer.
            clipping: whether codes follow from the scales, see `ClippedPart`.
        """
        super().__init__()
        quantized = quantized.to(linear.weight.device)
        self._fidelity = quantized.fidelity
        self._outliers = quantized.outliers
        self._row_scale = quantized.row_scale
        self.bias = linear.bias
        self.register_buffer("columns", quantized.tensors[COLUMNS].to(torch.int64))
        self.register_buffer("positions", self.columns.argsort())
        weight = linear.weight.data.float()
        self._set_outliers(weight)
        adapter = quantized.adapter
        self.adapter_a = nn.Parameter(adapter.a.float()) if adapter else None
        self.adapter_b = nn.Parameter(adapter.b.float()) if adapter else None
        if adapter is not None:
            weight = weight - adapter_weight(adapter)
        kind = ClippedPart if clipping else LatentPart
        self._parts = self._make_parts(weight[:, self.columns], quantized, kind)

    def _set_outliers(self, weight: Tensor) -> None:
        mask = None
        values = None
        if self._outliers is not None:
            values = torch.zeros_like(weight)
            add_outliers(values, self._outliers)
            ones = torch.ones_like(self._outliers.values)
            count = torch.zeros_like(weight)
            add_outliers(count, Outliers(ones, self._outliers.columns, self._outliers.starts))
            mask = count.bool()
        self.register_buffer("outlier_mask", mask)
        self.register_buffer("outlier_values", values)

    def _make_parts(
        self, ordered: Tensor, quantized: QuantizedWeight, kind: type[LatentPart]
    ) -> nn.ModuleList:
        """Return the latent parts of a weight whose columns are in stored order."""
        fidelity = quantized.fidelity
        parts = nn.ModuleList()
        start = 0
        named = named_parts(fidelity, quantized.in_features)
        for (_, columns, bits), part in zip(named, quantized.parts(), strict=True):
            weight = ordered[:, start : start + columns]
            unit = None
            if self._row_scale is not None:
                unit = scale_unit(self._row_scale, fidelity, bits)
            top = 2**fidelity.scale_bits - 1
            parts.append(kind(weight, part, bits, fidelity.group_size, unit, top))
            start += columns
        return parts

    @property
    def parts(self) -> list[LatentPart]:
        """The parts in stored order."""
        return [part for part in self._parts if isinstance(part, LatentPart)]

    def adapters(self) -> dict[str, nn.Parameter]:
        """The factors of the adapter by name; empty if there is no adapter."""
        named = {"adapter_a": self.adapter_a, "adapter_b": self.adapter_b}
        return {name: factor for name, factor in named.items() if factor is not None}

    def grid_weight(self) -> Tensor:
        """Return the weight without the adapter, float32 [out, in], differentiable."""
        ordered = torch.cat([part.weight() for part in self.parts], 1)
        weight: Tensor = Reorder.apply(ordered, self.positions, self.columns)  # type: ignore[no-untyped-call]
        if self.outlier_mask is not None and self.outlier_values is not None:
            weight = torch.where(self.outlier_mask, self.outlier_values, weight)
        return weight

    def weight(self) -> Tensor:
        """Return the current weight, float32 [out, in], differentiable."""
        weight = self.grid_weight()
        if self.adapter_a is not None and self.adapter_b is not None:
            weight = weight + self.adapter_b @ self.adapter_a
        return weight

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        """Return the current state as a quantized layer.

        Scales and adapters are rounded to 16 bits.
        """
        parts = []
        start = 0
        for part in self.parts:
            current = part.codes()
            width = current.codes.shape[1]
            if self.outlier_mask is not None:
                mask = self.outlier_mask[:, self.columns][:, start : start + width]
                zero = current.zero.t().repeat_interleave(self._fidelity.group_size, 1)
                codes = torch.where(mask, zero[:, :width], current.codes)
                current = replace(current, codes=codes)
            parts.append(current)
            start += width
        bare = replace(self._fidelity, adapter_rank=0)
        weight = QuantizedWeight.from_codes(
            bare, self.columns, tuple(parts), self._row_scale, self._outliers
        )
        if self.adapter_a is None or self.adapter_b is None:
            return weight
        adapter = Adapter(self.adapter_a.half(), self.adapter_b.half())
        return weight.with_adapter(self._fidelity.adapter_rank, adapter)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return hidden_states @ W' + bias; [..., in] to [..., out]."""
        weight = self.weight()
        if not torch.is_autocast_enabled(weight.device.type):
            weight = weight.to(hidden_states.dtype)
        return nn.functional.linear(hidden_states, weight, self.bias)
