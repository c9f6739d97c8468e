"""Second moments of what enters the layers, from calibration windows."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantizer.modules.linear import get_linear
from quantizer.plans.plan import LayerSpec
from quantizer.running.runner import BlockRunner


@dataclass(frozen=True, slots=True)
class Calibration:
    """Token windows that a model is quantized on.

    Attributes:
        windows: int64 [windows, tokens].
        batch: windows that are run at once.
    """

    windows: Tensor
    batch: int

    def batches(self) -> tuple[Tensor, ...]:
        """Return the windows in batches, [batch, tokens] each."""
        return torch.split(self.windows, self.batch)


def input_groups(
    runner: BlockRunner, members: Sequence[LayerSpec], batch: Tensor, hidden: Tensor, index: int
) -> list[list[LayerSpec]]:
    """Return a block's layers in the order in which they are called, those that share one input tensor together.

    Layers that the block does not call on this batch, such as experts that no token chose, come
    last, each on its own.
    """
    calls: list[tuple[LayerSpec, Tensor]] = []
    handles = [
        get_linear(runner.model, layer.name).register_forward_pre_hook(
            lambda _, args, layer=layer: calls.append((layer, args[0]))
        )
        for layer in members
    ]
    try:
        runner.run_blocks(batch, hidden, index, index + 1)
    finally:
        for handle in handles:
            handle.remove()
    groups: list[tuple[Tensor, list[LayerSpec]]] = []
    seen: set[str] = set()
    for layer, states in calls:
        if layer.name in seen:
            continue
        seen.add(layer.name)
        if groups and groups[-1][0] is states:
            groups[-1][1].append(layer)
        else:
            groups.append((states, [layer]))
    return [group for _, group in groups] + [[layer] for layer in members if layer.name not in seen]


def input_moments(
    runner: BlockRunner,
    layer: LayerSpec,
    batches: Sequence[Tensor],
    hidden: Sequence[Tensor],
    index: int,
) -> Tensor:
    """Return the mean of x x' over the inputs x that `layer` gets on the calibration windows.

    Float32 [in, in].
    """
    linear = get_linear(runner.model, layer.name)
    total, tokens = (
        torch.zeros(layer.in_features, layer.in_features, device=linear.weight.device),
        0,
    )
    for batch, states in zip(batches, hidden, strict=True):
        for inputs in runner.module_inputs(linear, batch, states, index):
            rows = inputs.reshape(-1, layer.in_features).float()
            total.addmm_(rows.t(), rows)
            tokens += len(rows)
    return total / max(tokens, 1)


def head_moments(runner: BlockRunner, batches: Sequence[Tensor]) -> Tensor:
    """Return the mean of x x' over what enters the head, float32 [hidden, hidden].

    Batches are int64 [windows, tokens].
    """
    total, tokens = torch.zeros(()), 0
    for batch in batches:
        states = runner.final_states(batch).float().flatten(0, 1)
        total = total.to(states.device) + states.t() @ states
        tokens += len(states)
    return total / tokens
