"""How much of a model is reached: which weights of its blocks are quantized, what stays and why."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from quantizer.plans.plan import starred
from quantizer.structure.blocks import find_blocks
from quantizer.structure.kept import kept_layers

GOOD_SHARE = 0.9
"""Share of the block weights; with less, a user is told."""

NO_LINEAR = "it is no linear layer"


@dataclass(frozen=True, slots=True)
class Stay:
    """Weights of the blocks that stay as they are.

    Attributes:
        kind: what they are called, with `*` for numbers.
        reason: why they stay.
        count: how many there are of them.
        weights: their number of weights together.
    """

    kind: str
    reason: str
    count: int
    weights: int


@dataclass(frozen=True, slots=True)
class Coverage:
    """Which weights of a model's blocks are quantized.

    Attributes:
        model_class: name of the model's class.
        blocks: number of blocks.
        layers: number of layers that are quantized, by kind, with `*` for numbers.
        block_weights: weights of all blocks.
        reached_weights: those in layers that are quantized.
        stays: the other ones, largest first.
    """

    model_class: str
    blocks: int
    layers: Mapping[str, int]
    block_weights: int
    reached_weights: int
    stays: tuple[Stay, ...]

    @property
    def share(self) -> float:
        """Share of the block weights that are quantized."""
        return self.reached_weights / self.block_weights if self.block_weights else 0.0

    @property
    def warning(self) -> str | None:
        """A sentence for the user where less than `GOOD_SHARE` is reached."""
        if self.share >= GOOD_SHARE or not self.stays:
            return None
        most = self.stays[0]
        return (
            f"only {self.share:.0%} of the weights in the blocks are quantized; the largest part "
            f"that stays is {most.kind} ({most.weights} weights): {most.reason}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the coverage as JSON values."""
        return {
            "class": self.model_class,
            "blocks": self.blocks,
            "layers_by_kind": dict(self.layers),
            "block_weights": self.block_weights,
            "reached_share": round(self.share, 4),
            "stays": [
                {
                    "kind": each.kind,
                    "reason": each.reason,
                    "count": each.count,
                    "weights": each.weights,
                }
                for each in self.stays
            ],
            "warning": self.warning,
        }


def measure_coverage(model: nn.Module) -> Coverage:
    """Return which weights of the blocks of a model, in linear form, are quantized.

    Raises:
        ModelError: see `quantizer.structure.blocks.find_blocks`.
    """
    path, blocks = find_blocks(model)
    kept = kept_layers(model, path, blocks)
    reached: Counter[str] = Counter()
    counts: Counter[tuple[str, str]] = Counter()
    weights: Counter[tuple[str, str]] = Counter()
    reached_weights = 0
    seen: set[int] = set()
    for index, block in enumerate(blocks):
        for name, parameter in block.named_parameters():
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            owner, _, leaf = name.rpartition(".")
            is_layer = leaf == "weight" and isinstance(block.get_submodule(owner), nn.Linear)
            reason = kept.get(f"{path}.{index}.{owner}") if is_layer else NO_LINEAR
            if reason is None:
                reached[starred(owner)] += 1
                reached_weights += parameter.numel()
            else:
                counts[starred(name), reason] += 1
                weights[starred(name), reason] += parameter.numel()
    stays = tuple(
        Stay(kind, reason, counts[kind, reason], number)
        for (kind, reason), number in weights.most_common()
    )
    return Coverage(
        type(model).__name__,
        len(blocks),
        dict(reached),
        reached_weights + sum(weights.values()),
        reached_weights,
        stays,
    )
