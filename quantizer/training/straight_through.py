"""Differentiable functions of latent codes and scales, with straight-through gradients."""

from typing import Any

import torch
from torch import Tensor

HALF = 0.5
"""Distance from a code at which a latent code starts to round to another code."""


class Round(torch.autograd.Function):
    """clamp(round(value), low, top), with the gradient of clamp(value, low - 0.5, top + 0.5)."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, low: int, top: int) -> Tensor:
        """Return whole numbers as floats."""
        ctx.save_for_backward(_is_on_grid(value, low, top))
        return value.round().clamp_(low, top)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient in the values."""
        (is_on_grid,) = ctx.saved_tensors
        return gradients[0] * is_on_grid, None, None


class Dequantize(torch.autograd.Function):
    """(clamp(round(code), 0, top) - zero) * scale.

    The gradient in the codes is that of `Round`, the gradient in the scales is exact. Codes are
    rounded again in the backward pass: to keep them would take as much memory as the weights.
    """

    @staticmethod
    def forward(ctx: Any, latent: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
        """Return the weights, in the shape of the codes."""
        ctx.save_for_backward(latent, scale, zero)
        ctx.top = top
        return latent.round().clamp_(0, top).sub_(zero).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Return the gradients in codes and scales."""
        (gradient,) = gradients
        latent, scale, zero = ctx.saved_tensors
        in_codes = None
        in_scale = None
        if ctx.needs_input_grad[0]:
            in_codes = (gradient * scale).mul_(_is_on_grid(latent, 0, ctx.top))
        if ctx.needs_input_grad[1]:
            steps = latent.round().clamp_(0, ctx.top).sub_(zero)
            in_scale = steps.mul_(gradient).sum(-1, keepdim=True)
        return in_codes, in_scale, None, None


class Reorder(torch.autograd.Function):
    """The columns of a weight in another order.

    The backward pass selects by the inverse order; to add gradients at indices, as PyTorch does,
    is many times slower.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        """Return column order[k] as column k."""
        ctx.save_for_backward(inverse)
        return weight.index_select(1, order)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient in the columns in their original order."""
        (inverse,) = ctx.saved_tensors
        return gradients[0].index_select(1, inverse), None, None


def _is_on_grid(value: Tensor, low: int, top: int) -> Tensor:
    """Return where values are off the grid low .. top by no more than half a step."""
    return (value >= low - HALF) & (value <= top + HALF)
