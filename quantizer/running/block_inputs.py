"""A decoder block with the states that enter it on calibration windows."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from quantizer.running.runner import BlockRunner


@dataclass(frozen=True, slots=True)
class BlockInputs:
    """A block with its inputs on the calibration windows.

    Attributes:
        runner: the model.
        index: index of the block.
        batches: token ids of each batch, int64 [windows, tokens].
        hidden: hidden states of each batch that enter the block, [windows, tokens, hidden].
    """

    runner: BlockRunner
    index: int
    batches: Sequence[Tensor]
    hidden: Sequence[Tensor]
