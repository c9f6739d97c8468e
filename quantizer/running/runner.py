"""Run parts of a decoder model: its start, some of its blocks, or its end."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantizer.errors import ModelError
from quantizer.kernels.precision import matmul_autocast
from quantizer.running.memory import MicroBatches
from quantizer.running.partial_forward import (
    PartialForward,
    StopForward,
    before_each_call,
    stop_with_input,
)
from quantizer.structure.blocks import find_blocks


class BlockRunner:
    """Runs parts of a transformers causal language model in evaluation mode.

    Hidden states have the shape [batch, tokens, hidden]; token ids are int64 [batch, tokens].
    Methods whose name does not end in `with_gradient` run without gradients, and run windows that
    do not fit into memory together in smaller batches (`quantizer.running.memory`). Only `logits`
    is differentiable as well, and takes all windows at once.

    Attributes:
        model: the model.
        precision: dtype in which products of float32 matrices are computed.
        blocks: the model's decoder blocks.
        head: the model's output head.
    """

    def __init__(self, model: nn.Module, precision: torch.dtype = torch.float32) -> None:
        """Find the blocks and the head of a model.

        Raises:
            ModelError: the model has no blocks or no head.
        """
        self.model = model
        self.precision = precision
        self.blocks = find_blocks(model)[1]
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if not isinstance(head, nn.Module):
            raise ModelError(
                f"{type(model).__name__} has no output head; a causal language model is needed"
            )
        self.head = head
        self._forward = PartialForward(model, self.blocks)
        self._micro_batches = MicroBatches()

    def initial_states(self, input_ids: Tensor) -> Tensor:
        """Return the hidden states that enter the first block."""

        def run(rows: slice) -> Tensor:
            return self._run(input_ids[rows], stop_before=0)

        with torch.no_grad():
            return self._micro_batches.cat(run, len(input_ids))

    def run_blocks(self, input_ids: Tensor, hidden: Tensor, first: int, last: int) -> Tensor:
        """Return the hidden states after blocks first .. last-1.

        Args:
            input_ids: token ids that `hidden` comes from.
            hidden: hidden states that enter block `first`.
            first: index of the first block.
            last: index of the block after the last one; with `last` equal to `first` no block runs.
        """
        if first == last:
            return hidden

        def run(rows: slice) -> Tensor:
            return self._run(input_ids[rows], first=first, hidden=hidden[rows], stop_after=last - 1)

        with torch.no_grad():
            return self._micro_batches.cat(run, len(input_ids))

    def advance(
        self, batches: Sequence[Tensor], hidden: Sequence[Tensor], index: int
    ) -> list[Tensor]:
        """Return the hidden states of each batch after block `index`.

        Args:
            batches: token ids of each batch.
            hidden: hidden states of each batch before the block.
            index: index of the block.
        """
        return [
            self.run_blocks(batch, states, index, index + 1)
            for batch, states in zip(batches, hidden, strict=True)
        ]

    def module_inputs(
        self, module: nn.Module, input_ids: Tensor, hidden: Tensor, index: int
    ) -> list[Tensor]:
        """Return the inputs of a module of block `index` when `hidden` enters the block.

        The block runs only as far as the module.

        Returns:
            A tensor for each micro-batch of windows; none if the block does not call the module.
        """

        def run(rows: slice) -> list[Tensor]:
            inputs: list[Tensor] = []

            def record(_: nn.Module, args: tuple[Any, ...]) -> None:
                inputs.append(args[0])
                raise StopForward(args[0])

            with before_each_call(module, record):
                self._run(input_ids[rows], first=index, hidden=hidden[rows], stop_after=index)
            return inputs

        with torch.no_grad():
            micro_batches = self._micro_batches.run(run, len(input_ids))
        return [states for inputs in micro_batches for states in inputs]

    def run_block_with_gradient(self, input_ids: Tensor, hidden: Tensor, index: int) -> Tensor:
        """Return the hidden states after block `index`, differentiable in all that it computes.

        Args:
            input_ids: token ids that `hidden` comes from.
            hidden: hidden states that enter the block.
            index: index of the block.
        """
        with torch.enable_grad():
            return self._run(input_ids, first=index, hidden=hidden, stop_after=index)

    def final_states(self, input_ids: Tensor) -> Tensor:
        """Return the hidden states that enter the output head."""
        return self.head_input(input_ids, self.initial_states(input_ids), 0)

    def final_states_with_gradient(self, input_ids: Tensor) -> Tensor:
        """Return what `final_states` does, differentiable in all that the blocks compute."""
        hidden = self.initial_states(input_ids).requires_grad_()
        with torch.enable_grad():
            return self._head_input(input_ids, hidden, 0)

    def head_input(self, input_ids: Tensor, hidden: Tensor, first: int) -> Tensor:
        """Return the hidden states that enter the output head when `hidden` enters block `first`.

        With `first` equal to the number of blocks, `hidden` is the output of the last one.
        """

        def run(rows: slice) -> Tensor:
            return self._head_input(input_ids[rows], hidden[rows], first)

        with torch.no_grad():
            return self._micro_batches.cat(run, len(input_ids))

    def logits(self, input_ids: Tensor, head_input: Tensor) -> Tensor:
        """Return the logits when `head_input` enters the output head, differentiable in it.

        Returns:
            [batch, tokens, vocabulary].
        """

        def replace(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (head_input, *args[1:])

        with (
            before_each_call(self.head, replace),
            matmul_autocast(self.precision, input_ids.device),
        ):
            logits: Tensor = self._forward.output_without_blocks(input_ids).logits
        return logits

    def _head_input(self, input_ids: Tensor, hidden: Tensor, first: int) -> Tensor:
        with before_each_call(self.head, stop_with_input):
            return self._run(input_ids, first=first, hidden=hidden)

    def _run(self, input_ids: Tensor, **part: Any) -> Tensor:
        """Run a part of the model, see `PartialForward.run`, in the runner's precision."""
        with matmul_autocast(self.precision, input_ids.device):
            return self._forward.run(input_ids, **part)
