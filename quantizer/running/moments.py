"""Second moments of the inputs of layers, measured on calibration windows."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantizer.modules.linear import get_linear
from quantizer.plans.plan import LayerSpec
from quantizer.running.block_inputs import BlockInputs
from quantizer.running.runner import BlockRunner


@dataclass(frozen=True, slots=True)
class Calibration:
    """Token windows on which a model is quantized.

    Attributes:
        windows: token ids, int64 [windows, tokens].
        batch: windows that run at once.
    """

    windows: Tensor
    batch: int

    def batches(self) -> tuple[Tensor, ...]:
        """Return the windows in batches, [batch, tokens] each."""
        return torch.split(self.windows, self.batch)


def input_groups(inputs: BlockInputs, members: Sequence[LayerSpec]) -> list[list[LayerSpec]]:
    """Return the layers of a block in groups of those that share one input tensor.

    Groups are in the order in which the block calls them on the first batch. Layers that it does
    not call there, such as experts that no token chose, come last, each in a group of its own.

    Args:
        inputs: the block.
        members: its layers.
    """
    calls: list[tuple[LayerSpec, Tensor]] = []
    handles = [
        get_linear(inputs.runner.model, layer.name).register_forward_pre_hook(
            lambda _, args, layer=layer: calls.append((layer, args[0]))
        )
        for layer in members
    ]
    try:
        inputs.runner.run_blocks(
            inputs.batches[0], inputs.hidden[0], inputs.index, inputs.index + 1
        )
    finally:
        for handle in handles:
            handle.remove()
    groups: list[tuple[Tensor, list[LayerSpec]]] = []
    called: set[str] = set()
    for layer, states in calls:
        if layer.name in called:
            continue
        called.add(layer.name)
        if groups and groups[-1][0] is states:
            groups[-1][1].append(layer)
        else:
            groups.append((states, [layer]))
    never_called = [[layer] for layer in members if layer.name not in called]
    return [group for _, group in groups] + never_called


def input_moments(inputs: BlockInputs, layer: LayerSpec) -> Tensor:
    """Return the mean of x x' over all inputs x of a layer of a block.

    Returns:
        float32 [in, in]; zeros for a layer that the block does not call.
    """
    linear = get_linear(inputs.runner.model, layer.name)
    total = torch.zeros(layer.in_features, layer.in_features, device=linear.weight.device)
    tokens = 0
    for batch, states in zip(inputs.batches, inputs.hidden, strict=True):
        for entering in inputs.runner.module_inputs(linear, batch, states, inputs.index):
            rows = entering.reshape(-1, layer.in_features).float()
            total.addmm_(rows.t(), rows)
            tokens += len(rows)
    return total / max(tokens, 1)


def head_moments(runner: BlockRunner, batches: Sequence[Tensor]) -> Tensor:
    """Return the mean of x x' over all inputs x of the output head.

    Args:
        runner: the model.
        batches: token ids of each batch, int64 [windows, tokens].

    Returns:
        float32 [hidden, hidden].
    """
    total = torch.zeros(())
    tokens = 0
    for batch in batches:
        states = runner.final_states(batch).float().flatten(0, 1)
        total = total.to(states.device) + states.t() @ states
        tokens += len(states)
    return total / tokens
