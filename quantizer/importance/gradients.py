"""Limit gradients to some weights of a model."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def gradients_only_of(model: nn.Module, weights: Iterable[Tensor]) -> Iterator[None]:
    """Let only the given weights require gradients, and restore all flags at the end."""
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        model.requires_grad_(requires_grad=False)
        for weight in weights:
            weight.requires_grad_()
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])
