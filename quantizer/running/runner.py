"""Run a part of a decoder model: from one block to another, with given hidden states.

The model's own forward pass is used throughout, with the blocks outside the part made transparent.
So masks, positions and whatever else an architecture hands to its blocks are right without this
module knowing of them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantizer.errors import ModelError
from quantizer.kernels.precision import matmul_autocast
from quantizer.running.memory import MicroBatches
from quantizer.running.structure import find_blocks


class _Stop(Exception):
    """Unwinds the forward pass once the wanted tensor is in hand."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


class BlockRunner:
    """Runs parts of `model`, a transformers causal language model in evaluation mode.

    Without gradients, windows that do not fit into memory together are run in pieces, see
    `quantizer.running.memory`.
    """

    def __init__(self, model: nn.Module, precision: torch.dtype = torch.float32) -> None:
        """Find the blocks and the head.

        Args:
            model: the model.
            precision: dtype in which products of float32 matrices are computed.

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
        self._wraps_output: bool | None = None
        self._micro_batches = MicroBatches()

    def initial_states(self, input_ids: Tensor) -> Tensor:
        """Return the hidden states that enter the first block, [batch, tokens, hidden]."""
        with torch.no_grad():
            return self._micro_batches.cat(
                lambda some: self._run(input_ids[some], stop_before=0), len(input_ids)
            )

    def run_blocks(self, input_ids: Tensor, hidden: Tensor, first: int, last: int) -> Tensor:
        """Return the hidden states after blocks first .. last-1, when `hidden` enters block `first`; [batch, tokens, hidden].

        The `input_ids` [batch, tokens] are those that `hidden` comes from.
        """
        if first == last:
            return hidden

        def run(some: slice) -> Tensor:
            return self._run(input_ids[some], first=first, hidden=hidden[some], stop_after=last - 1)

        with torch.no_grad():
            return self._micro_batches.cat(run, len(input_ids))

    def advance(
        self, batches: Sequence[Tensor], hidden: Sequence[Tensor], index: int
    ) -> list[Tensor]:
        """Return the hidden states of each batch after block `index`.

        Args:
            batches: token ids, int64 [windows, tokens] each.
            hidden: the hidden states of each batch before the block, [windows, tokens, hidden].
            index: index of the block.
        """
        return [
            self.run_blocks(batch, states, index, index + 1)
            for batch, states in zip(batches, hidden, strict=True)
        ]

    def module_inputs(
        self, module: nn.Module, input_ids: Tensor, hidden: Tensor, index: int
    ) -> list[Tensor]:
        """Return what enters a module of block `index` when `hidden` enters the block.

        Of the block, no more than that is run.

        A tensor for each piece of the windows that is run at once; none where the block does not
        call the module.
        """

        def run(some: slice) -> list[Tensor]:
            found: list[Tensor] = []

            def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
                found.append(args[0])
                raise _Stop(args[0])

            with _before(module, stop):
                self._run(input_ids[some], first=index, hidden=hidden[some], stop_after=index)
            return found

        with torch.no_grad():
            return [
                states for found in self._micro_batches.run(run, len(input_ids)) for states in found
            ]

    def run_block_with_gradient(self, input_ids: Tensor, hidden: Tensor, index: int) -> Tensor:
        """Return the hidden states after block `index` when `hidden` enters it, differentiable in all that the block computes."""
        with torch.enable_grad():
            return self._run(input_ids, first=index, hidden=hidden, stop_after=index)

    def head_input(self, input_ids: Tensor, hidden: Tensor, first: int) -> Tensor:
        """Return what enters the output head when `hidden` enters block `first`.

        [batch, tokens, hidden].

        With `first` the number of blocks, `hidden` is what leaves the last one.
        """
        with torch.no_grad():
            return self._micro_batches.cat(
                lambda some: self._head_input(input_ids[some], hidden[some], first), len(input_ids)
            )

    def final_states(self, input_ids: Tensor) -> Tensor:
        """Return what enters the output head after all blocks, [batch, tokens, hidden]."""
        return self.head_input(input_ids, self.initial_states(input_ids), 0)

    def _head_input(self, input_ids: Tensor, hidden: Tensor, first: int) -> Tensor:
        def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
            raise _Stop(args[0])

        with _before(self.head, stop):
            return self._run(input_ids, first=first, hidden=hidden)

    def final_states_with_gradient(self, input_ids: Tensor) -> Tensor:
        """Return what enters the output head, [batch, tokens, hidden], differentiable in all that the blocks compute."""
        hidden = self.initial_states(input_ids).requires_grad_()
        with torch.enable_grad():
            return self._head_input(input_ids, hidden, 0)

    def logits(self, input_ids: Tensor, head_input: Tensor) -> Tensor:
        """Return the logits [batch, tokens, vocabulary] when `head_input` enters the output head.

        Differentiable in it.
        """

        def replace(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (head_input, *args[1:])

        self._observe(input_ids)
        transparent = self._blocks_replaced(len(self.blocks), None, None, None)
        with (
            _before(self.head, replace),
            transparent,
            matmul_autocast(self.precision, input_ids.device),
        ):
            output: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
            return output

    def _run(
        self,
        input_ids: Tensor,
        *,
        first: int = 0,
        hidden: Tensor | None = None,
        stop_before: int | None = None,
        stop_after: int | None = None,
    ) -> Tensor:
        if first > 0:
            self._observe(input_ids)
        try:
            with (
                self._blocks_replaced(first, hidden, stop_before, stop_after),
                matmul_autocast(self.precision, input_ids.device),
            ):
                self.model(input_ids=input_ids, use_cache=False)
        except _Stop as stop:
            return stop.value
        raise ModelError(
            f"{type(self.model).__name__} did not pass through its blocks in order; it is not "
            "supported"
        )

    def _observe(self, input_ids: Tensor) -> None:
        """Learn from one token, once, whether blocks return bare states or tuples."""
        if self._wraps_output is None:
            with torch.no_grad():
                self._run(input_ids[:1, :1], stop_after=0)

    @contextmanager
    def _blocks_replaced(
        self, first: int, hidden: Tensor | None, stop_before: int | None, stop_after: int | None
    ) -> Iterator[None]:
        """Make blocks before `first` transparent, feed `hidden` to `first`, stop around the named block."""
        overrides = [vars(block).get("forward") for block in self.blocks]
        try:
            for index, block in enumerate(self.blocks):
                if index == stop_before:
                    block.forward = _stopping_before
                elif index < first:
                    block.forward = self._passing(hidden if index == len(self.blocks) - 1 else None)
                else:
                    given = hidden if index == first else None
                    block.forward = self._running(block.forward, given, stops=index == stop_after)
            yield
        finally:
            for block, override in zip(self.blocks, overrides, strict=True):
                if override is None:
                    del block.forward  # uncovers the method of the class
                else:
                    block.forward = override

    def _passing(self, given: Tensor | None) -> Callable[..., Any]:
        def skip(*args: Any, **kwargs: Any) -> Any:
            states = _states(args, kwargs) if given is None else given
            return (states,) if self._wraps_output else states

        return skip

    def _running(
        self, forward: Callable[..., Any], given: Tensor | None, *, stops: bool
    ) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if given is not None:
                if args:
                    args = (given, *args[1:])
                else:
                    kwargs = {**kwargs, "hidden_states": given}
            output = forward(*args, **kwargs)
            self._wraps_output = isinstance(output, tuple)
            if stops:
                raise _Stop(output[0] if isinstance(output, tuple) else output)
            return output

        return run


@contextmanager
def _before(module: nn.Module, hook: Callable[[nn.Module, tuple[Any, ...]], Any]) -> Iterator[None]:
    """Have a hook called before each call of a module."""
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _stopping_before(*args: Any, **kwargs: Any) -> Any:
    raise _Stop(_states(args, kwargs))


def _states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    states: Tensor = args[0] if args else kwargs["hidden_states"]
    return states
