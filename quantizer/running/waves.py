"""Moments of the experts of a block, all in one pass.

The experts of a layer do not depend on each other. So the same projection of all of them is
measured at once, and the cost of a block does not grow with the number of its experts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantizer.errors import ModelError
from quantizer.modules.linear import get_linear
from quantizer.plans.plan import LayerSpec
from quantizer.running.block_inputs import BlockInputs
from quantizer.running.moments import input_groups, input_moments
from quantizer.structure.experts import SeparateExperts

Group = Sequence[LayerSpec]
"""Layers that share one input tensor."""

_WAVE_BYTES = 2**30
"""Memory for the moments that are measured at once."""


@dataclass(frozen=True, slots=True)
class GroupMoments:
    """Second moments of the inputs of layers that share them.

    Attributes:
        group: the layers.
        matrix: mean of x x' over the inputs x, float32 [in, in]; zeros if there were none. For an
            expert that saw fewer tokens than it has columns, its own mean, weighted by tokens /
            columns, plus the mean over all experts with the rest of the weight.
        tokens: number of inputs.
        share: part of all calibration tokens that the layers saw; 1 for layers that see all. At
            least that of one token, so that no damage is free.
    """

    group: Group
    matrix: Tensor
    tokens: int
    share: float

    @property
    def is_starved(self) -> bool:
        """Whether fewer tokens reached the layers than they have columns, though more might have.

        Layers that see every token never are.
        """
        return self.share < 1 and self.tokens < len(self.matrix)


def waves(inputs: BlockInputs, members: Sequence[LayerSpec]) -> list[list[Group]]:
    """Return the groups of a block's layers in waves, in the order in which the block calls them.

    A wave is one group, or those of the same projections of several experts; a wave of many experts
    is cut to what fits into memory.

    Args:
        inputs: the block.
        members: its layers.
    """
    found: dict[str, list[Group]] = {}
    for group in input_groups(inputs, members):
        experts = _experts_around(inputs.runner.model, group[0].name)
        found.setdefault(experts or group[0].name, []).append(group)
    return [piece for groups in found.values() for piece in _pieces(groups)]


def measure_wave(inputs: BlockInputs, wave: Sequence[Group]) -> list[GroupMoments]:
    """Return the moments of each group of a wave.

    Raises:
        ModelError: moments are not finite; names the layer and the block.
    """
    if _experts_around(inputs.runner.model, wave[0][0].name) is not None:
        measured = _expert_moments(inputs, wave)
    else:
        positions = sum(batch.numel() for batch in inputs.batches)
        matrix = input_moments(inputs, wave[0][0])
        measured = [GroupMoments(wave[0], matrix, positions, 1.0)]
    for each in measured:
        if not bool(torch.isfinite(each.matrix).all()):
            raise ModelError(
                f"the inputs of layer {each.group[0].name!r} (block {inputs.index}) are not finite "
                "on the calibration text: the model overflows there; run it in float32 or use "
                "other text"
            )
    return measured


def _expert_moments(inputs: BlockInputs, wave: Sequence[Group]) -> list[GroupMoments]:
    """Return the moments of groups of experts, measured in one pass."""
    positions = sum(batch.numel() for batch in inputs.batches)
    sums = [_Sum(get_linear(inputs.runner.model, group[0].name)) for group in wave]
    for batch, states in zip(inputs.batches, inputs.hidden, strict=True):
        inputs.runner.run_blocks(batch, states, inputs.index, inputs.index + 1)
    for each in sums:
        each.handle.remove()
    total: Any = sum(each.total for each in sums)
    mean = total / max(sum(each.tokens for each in sums), 1)
    moments = []
    for group, each in zip(wave, sums, strict=True):
        matrix = each.total / max(each.tokens, 1)
        own = min(each.tokens / len(matrix), 1.0)
        if own < 1:
            matrix = matrix * own + mean * (1 - own)
        share = min(max(each.tokens, 1) / positions, 1.0)
        moments.append(GroupMoments(group, matrix, each.tokens, share))
    return moments


class _Sum:
    """Adds up x x' over all inputs x of a linear layer while the model runs."""

    def __init__(self, linear: nn.Linear) -> None:
        columns = linear.in_features
        self.total = torch.zeros(columns, columns, device=linear.weight.device)
        self.tokens = 0
        self.handle = linear.register_forward_pre_hook(self._add)

    def _add(self, linear: nn.Module, args: tuple[Any, ...]) -> None:
        rows = args[0].reshape(-1, linear.in_features).float()
        self.total.addmm_(rows.t(), rows)
        self.tokens += len(rows)


def _experts_around(model: nn.Module, name: str) -> str | None:
    """Return the layer's name with a star for its expert; None if it is in no expert."""
    parts = name.split(".")
    for at in range(len(parts) - 1, 0, -1):
        if parts[at].isdigit() and isinstance(
            model.get_submodule(".".join(parts[:at])), SeparateExperts
        ):
            return ".".join([*parts[:at], "*", *parts[at + 1 :]])
    return None


def _pieces(groups: Sequence[Group]) -> Iterator[list[Group]]:
    """Cut a wave into pieces whose moments fit into `_WAVE_BYTES`."""
    size = max(1, _WAVE_BYTES // (4 * groups[0][0].in_features ** 2))
    for start in range(0, len(groups), size):
        yield list(groups[start : start + size])
