"""The columns of a latent layer that share a code width: latent codes and scales."""

from typing import Any

import torch
from torch import Tensor, nn

from quantizer.packed.grid import FLOAT16_MAX, FLOAT16_SMALLEST_NORMAL
from quantizer.packed.weight import PartCodes
from quantizer.training.straight_through import Dequantize, Round

START_RADIUS = 0.48
"""Largest distance between a latent code and its stored code at the start.

With 0.5 and more, too many codes change at the first steps; with much less, codes first have far to
go and scales learn alone. Compared in tests/benchmarks/LOG.md, "training, formats, light methods",
where it is called the cell.
"""


class LatentPart(nn.Module):
    """One part of a latent layer.

    Attributes:
        bits: code width.
        latent: codes before rounding, float32 [out, groups, group size]; the last group is padded
            with columns that are not used.
        factor: factors of the scales, 1 at the start, float32 [out, groups, 1].
        scale: the stored scales, float32 [out, groups, 1].
        zero: zero points, whole numbers as floats, [out, groups, 1].
        unit: value of the scale code 1, float32 [out, 1, 1]; None for 16-bit scales.
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
        largest_scale_code: int = 0,
    ) -> None:
        """Start from the codes of a part.

        Args:
            weight: the original weight of the part, float32 [out, columns].
            part: its codes.
            bits: code width.
            group_size: columns that share a scale.
            row_unit: value of the scale code 1, [out]; None for 16-bit scales.
            largest_scale_code: the largest scale code.
        """
        super().__init__()
        self.bits = bits
        self._columns = weight.shape[1]
        self._top = 2**bits - 1
        self._largest_scale_code = largest_scale_code
        self.register_buffer("scale", part.scale.t().unsqueeze(-1).contiguous())
        self.register_buffer("zero", part.zero.t().unsqueeze(-1).contiguous())
        self.register_buffer("unit", None if row_unit is None else row_unit.view(-1, 1, 1))
        padding = (0, -weight.shape[1] % group_size)
        shape = (weight.shape[0], -1, group_size)
        codes = nn.functional.pad(part.codes, padding).view(shape)
        exact = nn.functional.pad(weight, padding).view(shape) / self.scale + self.zero
        self.latent = nn.Parameter(exact.clamp(codes - START_RADIUS, codes + START_RADIUS))
        self.factor = nn.Parameter(torch.ones_like(self.scale))

    def scales(self) -> Tensor:
        """Return the current scales, float32 [out, groups, 1], differentiable."""
        scale = self.factor * self.scale
        if self.unit is None:
            return scale
        codes: Tensor = Round.apply(scale / self.unit, 1, self._largest_scale_code)  # type: ignore[no-untyped-call]
        return self.unit * codes

    def unrounded(self) -> Tensor:
        """Return the codes before rounding, float32 [out, groups, group size], differentiable."""
        return self.latent

    def weight(self) -> Tensor:
        """Return the part's weight, float32 [out, columns], differentiable."""
        weight: Tensor = Dequantize.apply(self.unrounded(), self.scales(), self.zero, self._top)  # type: ignore[no-untyped-call]
        return weight.flatten(1)[:, : self._columns]

    @torch.no_grad()
    def codes(self) -> PartCodes:
        """Return the part's current codes, with scales that can be stored."""
        scale = self.scales()
        if self.unit is None:
            scale = scale.clamp(FLOAT16_SMALLEST_NORMAL, FLOAT16_MAX).half().float()
        codes = self.unrounded().round().clamp(0, self._top).flatten(1)[:, : self._columns]
        return PartCodes(
            codes, scale.squeeze(-1).t().contiguous(), self.zero.squeeze(-1).t().contiguous()
        )


class ClippedPart(LatentPart):
    """A part whose codes follow from its scales: rounding to nearest on a grid of learned range.

    A weight that lies further than `START_RADIUS` from its stored code counts as one at that
    distance. So training starts from the stored codes, and keeps the errors that they compensate
    for each other. A start from codes rounded to nearest is worse, and few steps do not make up for
    it: tests/benchmarks/LOG.md, "learning rates of scales and adapters were three to a hundred
    times too low".

    The gradient in a scale is that of LSQ (arXiv 1902.08153, section 2.1): the rounding error of a
    weight in codes, or the code itself where the weight is clipped. OmniQuant (arXiv 2308.13137,
    section 3.2) and ApiQ learn a factor for each end of the range; here one factor serves both, as
    zero points stay.
    """

    def __init__(self, weight: Tensor, *args: Any) -> None:
        """Fix the latent codes, as weights in units of the initial scale."""
        super().__init__(weight, *args)
        self.latent = nn.Parameter(self.latent.data - self.zero, requires_grad=False)

    def unrounded(self) -> Tensor:
        """Return weight / scale + zero point."""
        return self.latent / self.factor + self.zero
