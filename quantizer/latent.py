"""A quantized linear layer in a form that gradients can change: latent codes and scales; zero points and column order stay."""

from typing import Any

import torch
from torch import Tensor, nn

from quantizer.grid import LARGEST_SCALE, SMALLEST_SCALE
from quantizer.weight import COLUMNS, PartCodes, QuantizedWeight, named_parts

HALF = 0.5
"""How far from a code a latent code rounds to another one."""
CELL = 0.45
"""How far from its stored code a latent code may start."""


class LatentLinear(nn.Module):
    """A linear layer whose weight is scale * (round(latent code) - zero), differentiable in latent codes and scales.

    Rounding passes gradients on as if it were the identity, and none where the latent code is off the grid by more than half a
    step (the straight-through estimator of arXiv 1308.3432, section 4, with the clipped gradient of arXiv 1902.08153). Scales have
    their true gradient. Training all of this against a loss is what arXiv 2407.11062, section 3.2, does block by block.

    Attributes:
        places: where each input column is in stored order, int64 [in].
    """

    places: Tensor

    def __init__(self, linear: nn.Linear, stored: QuantizedWeight) -> None:
        """Start from a stored form of `linear`, with latent codes as near to its weight as the stored codes allow.

        The layer then computes just what the stored form does; a latent code whose weight lies between two stored codes is near the
        border, and so the first to change.

        Args:
            linear: the original layer.
            stored: what it was quantized to.
        """
        super().__init__()
        self._fidelity, self._columns = stored.fidelity, stored.tensors[COLUMNS].to(torch.int64)
        self.register_buffer("places", self._columns.argsort())
        self.bias = linear.bias
        weight = linear.weight.data.float()[:, self._columns.to(linear.weight.device)]
        self._parts, start = nn.ModuleList(), 0
        for (_, columns, bits), part in zip(named_parts(stored.fidelity, stored.in_features), stored.parts(), strict=True):
            self._parts.append(LatentPart(weight[:, start : start + columns], part, bits, stored.fidelity.group_size))
            start += columns

    @property
    def parts(self) -> list["LatentPart"]:
        """The parts in stored order."""
        return [part for part in self._parts if isinstance(part, LatentPart)]

    def weight(self) -> Tensor:
        """Return the weight that the layer has now, float32 [out, in], differentiable."""
        return torch.cat([part.weight() for part in self.parts], 1)[:, self.places]

    def stored(self) -> QuantizedWeight:
        """Return the stored form of the layer as it is now; scales are rounded to 16 bits."""
        return QuantizedWeight.from_codes(self._fidelity, self._columns, tuple(part.codes() for part in self.parts))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return hidden_states @ W' + bias; [..., in] to [..., out]."""
        weight = self.weight()
        if not torch.is_autocast_enabled(weight.device.type):
            weight = weight.to(hidden_states.dtype)
        return nn.functional.linear(hidden_states, weight, self.bias)


class LatentPart(nn.Module):
    """One part of a latent layer: the columns that share a code width.

    Attributes:
        latent: codes before rounding, float32 [out, groups, group size], the last group padded with columns that are not used.
        factor: what multiplies the scales, 1 at the start, float32 [out, groups, 1].
        scale: the stored scales, float32 [out, groups, 1].
        zero: zero points, integers as floats, [out, groups, 1].
    """

    latent: nn.Parameter
    factor: nn.Parameter
    scale: Tensor
    zero: Tensor

    def __init__(self, weight: Tensor, part: PartCodes, bits: int, group_size: int) -> None:
        """Start from the codes of a part.

        Args:
            weight: what the codes stand for, float32 [out, columns].
            part: the codes.
            bits: their width.
            group_size: columns that share a scale.
        """
        super().__init__()
        self._columns, self._top = weight.shape[1], 2**bits - 1
        scale, zero, codes = (each.to(weight.device) for each in (part.scale, part.zero, part.codes))
        self.register_buffer("scale", scale.t().unsqueeze(-1).contiguous())  # [out, groups, 1]
        self.register_buffer("zero", zero.t().unsqueeze(-1).contiguous())
        padding = (0, -weight.shape[1] % group_size)
        shape = (weight.shape[0], -1, group_size)
        codes = nn.functional.pad(codes, padding).view(shape)
        exact = nn.functional.pad(weight, padding).view(shape) / self.scale + self.zero
        self.latent = nn.Parameter(exact.clamp(codes - CELL, codes + CELL))
        self.factor = nn.Parameter(torch.ones_like(self.scale))

    def weight(self) -> Tensor:
        """Return the part's weight, float32 [out, columns], differentiable."""
        codes: Tensor = _Round.apply(self.latent, self._top)  # type: ignore[no-untyped-call]
        return ((codes - self.zero) * (self.factor * self.scale)).flatten(1)[:, : self._columns]

    @torch.no_grad()
    def codes(self) -> PartCodes:
        """Return the part's codes as they are now, with scales that 16 bits can hold."""
        scale = (self.factor * self.scale).clamp(SMALLEST_SCALE, LARGEST_SCALE).half().float()
        codes = self.latent.round().clamp(0, self._top).flatten(1)[:, : self._columns]
        return PartCodes(codes, scale.squeeze(-1).t().contiguous(), self.zero.squeeze(-1).t().contiguous())


class _Round(torch.autograd.Function):
    """clamp(round(latent), 0, top), with the gradient of clamp(latent, -0.5, top + 0.5)."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, top: int) -> Tensor:
        """Return the codes as floats."""
        ctx.save_for_backward((latent >= -HALF) & (latent <= top + HALF))
        return latent.round().clamp_(0, top)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return the gradient in the latent codes."""
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None
