"""Bring a model into its linear form: every matrix that can be quantized is an `nn.Linear`."""

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from quantizer.errors import ModelError
from quantizer.structure.experts import (
    FusedExperts,
    RoutedExperts,
    SeparateExperts,
    fused_experts,
)

_TOKENS = 6
_TOLERANCE = 1e-2
"""Relative; products of bfloat16 differ by less, another formula by more."""


def to_linear_form(model: nn.Module, *, check: bool = False) -> None:
    """Replace transposed layers and fused experts of a model by linear layers, in place.

    The model computes what it did. Weights are views of the old ones, so no memory is needed.

    Args:
        model: the model; on the meta device, or with its weights.
        check: whether to run the first module of each class in both forms on random inputs.

    Raises:
        ModelError: `check` found that separate experts compute something else.
    """
    checked: set[type[nn.Module]] = set()
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            model.set_submodule(name, _linear(module))
            continue
        fused = fused_experts(module)
        if fused is None or isinstance(module, SeparateExperts):
            continue
        separate = fused.separate(module, fused)
        if check and type(module) not in checked:
            checked.add(type(module))
            _check_same(module, separate, fused)
        model.set_submodule(name, separate)


def _linear(conv: Any) -> nn.Linear:
    """Return the linear layer that computes what a Conv1D does; its weight is a view."""
    linear = nn.Linear(conv.nx, conv.nf, bias=False, device="meta")
    linear.weight = nn.Parameter(conv.weight.detach().t(), requires_grad=False)
    linear.bias = nn.Parameter(conv.bias.detach(), requires_grad=False)
    return linear


def _check_same(original: nn.Module, separate: SeparateExperts, fused: FusedExperts) -> None:
    """Compare both forms on random inputs.

    Raises:
        ModelError: they differ.
    """
    parameter = original.get_parameter(fused.projections[0].parameter)
    if parameter.device.type == "meta":
        return
    width = parameter.shape[-2 if fused.projections[0].transposed else -1]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(_TOKENS * fused.count, width, generator=generator).to(parameter)
    arguments: tuple[Any, ...] = (rows,)
    if len(fused.projections) == 1:
        arguments = (rows, [_TOKENS] * fused.count)
    elif isinstance(separate, RoutedExperts):
        chosen = torch.randint(fused.count, (len(rows), 1), generator=generator)
        chosen = torch.cat([chosen, (chosen + 1) % fused.count], dim=1)  # two different ones
        weights = torch.rand(chosen.shape, generator=generator)
        arguments = (rows, chosen.to(rows.device), weights.to(parameter))
    with torch.no_grad():
        found = separate(*arguments).float()
        wanted = original(*arguments).float().reshape(found.shape)
    if not torch.allclose(found, wanted, rtol=0, atol=_TOLERANCE * float(wanted.abs().max())):
        raise ModelError(
            f"the experts of class {type(original).__name__} compute something else when they are "
            "taken apart; such models are not supported"
        )
