"""Inner products of a loss gradient with weight changes, without storing weight gradients."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from quantizer.modules.linear import get_linear
from quantizer.plans.plan import LayerSpec
from quantizer.running.runner import BlockRunner

HeadGradient = Callable[[Tensor], Tensor]
"""Maps the input of the output head to the gradient of the loss there.

Both have the shape [windows, tokens, hidden].
"""

Changes = Callable[[str], Sequence[Tensor]]
"""Maps a layer's name to changes of its weight, [out, in] each.

It is called during the backward pass when the layer's turn comes, so that changes of other layers
need not be in memory.
"""


def inner_products(
    runner: BlockRunner,
    input_ids: Tensor,
    head_gradient: HeadGradient,
    layers: Sequence[LayerSpec],
    count: int,
    changes: Changes,
) -> Tensor:
    """Return <gradient of the loss, change> for each window and each change of a layer's weight.

    With x_t the inputs of a linear layer and d_t the gradient at its outputs, the product is sum_t
    d_t . (change x_t). One forward and one backward pass therefore serve all layers, and each
    change of a layer costs one matrix product.

    Args:
        runner: the model; its weights need no gradients.
        input_ids: int64 [windows, tokens].
        head_gradient: the loss, given by its gradient at the head's input.
        layers: the L layers.
        count: number of changes of each layer.
        changes: the changes.

    Returns:
        float64 [windows, L, count]; zeros for a layer that is not called. An expert gets the tokens
        of all windows in one tensor, so its rows all hold the mean over windows.
    """
    windows = len(input_ids)
    products = torch.zeros(windows, len(layers), count, dtype=torch.float64)

    def watch(row: int, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def on_forward(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            states = args[0].detach()
            output.register_hook(lambda gradient: add(row, name, states, gradient))  # type: ignore[no-untyped-call]

        return on_forward

    def add(row: int, name: str, states: Tensor, gradient: Tensor) -> None:
        for at, change in enumerate(changes(name)):
            each = nn.functional.linear(states, change.to(states.dtype)).float() * gradient.float()
            # Some models flatten windows and tokens into one dimension.
            if each.shape[:-1].numel() == input_ids.numel():
                products[:, row, at] += each.reshape(windows, -1).sum(1).double().cpu()
            else:  # an expert, which sees some of the tokens of all windows
                products[:, row, at] += float(each.sum()) / windows

    handles = [
        get_linear(runner.model, layer.name).register_forward_hook(watch(row, layer.name))
        for row, layer in enumerate(layers)
    ]
    try:
        with torch.enable_grad():
            states = runner.final_states_with_gradient(input_ids)
            torch.autograd.backward(states, head_gradient(states.detach()).to(states.dtype))
    finally:
        for handle in handles:
            handle.remove()
    return products
