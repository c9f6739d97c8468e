"""The forward pass of a decoder model, with only some of its blocks.

The model's own forward pass runs, and the blocks outside the wanted part pass their input through
unchanged. So masks, positions and whatever else an architecture gives to its blocks are right, and
this module knows nothing of them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantizer.errors import ModelError


class StopForward(Exception):
    """Ends a forward pass early, with the tensor that was wanted."""

    def __init__(self, value: Tensor) -> None:
        """Carry the tensor."""
        super().__init__()
        self.value = value


class PartialForward:
    """Runs parts of a transformers causal language model in evaluation mode."""

    def __init__(self, model: nn.Module, blocks: nn.ModuleList) -> None:
        """Take the model and the list of its decoder blocks."""
        self._model = model
        self._blocks = blocks
        self._returns_tuples: bool | None = None
        """Whether blocks return tuples instead of bare hidden states; None until one has run."""

    def run(
        self,
        input_ids: Tensor,
        *,
        first: int = 0,
        hidden: Tensor | None = None,
        stop_before: int | None = None,
        stop_after: int | None = None,
    ) -> Tensor:
        """Run the model until it is stopped, and return the tensor that it was stopped with.

        Args:
            input_ids: int64 [batch, tokens].
            first: the first block that runs; earlier ones pass their input through.
            hidden: hidden states that enter block `first`, [batch, tokens, hidden]; None for those
                that the model computes.
            stop_before: block whose input is returned.
            stop_after: block whose output is returned. Without either, a hook that the caller has
                set raises `StopForward`.

        Raises:
            ModelError: the model does not call its blocks in order.
        """
        if first > 0:
            self._learn_output_type(input_ids)
        try:
            with self._replaced_blocks(first, hidden, stop_before, stop_after):
                self._model(input_ids=input_ids, use_cache=False)
        except StopForward as stop:
            return stop.value
        raise ModelError(
            f"{type(self._model).__name__} did not pass through its blocks in order; it is not "
            "supported"
        )

    def output_without_blocks(self, input_ids: Tensor) -> Any:
        """Return the output of the model when no block runs."""
        self._learn_output_type(input_ids)
        with self._replaced_blocks(len(self._blocks), None, None, None):
            return self._model(input_ids=input_ids, use_cache=False)

    def _learn_output_type(self, input_ids: Tensor) -> None:
        """Run the first block on one token, once, to see whether blocks return tuples."""
        if self._returns_tuples is None:
            with torch.no_grad():
                self.run(input_ids[:1, :1], stop_after=0)

    @contextmanager
    def _replaced_blocks(
        self, first: int, hidden: Tensor | None, stop_before: int | None, stop_after: int | None
    ) -> Iterator[None]:
        """Replace the forward methods of all blocks, see `run`, and restore them at the end."""
        overrides = [vars(block).get("forward") for block in self._blocks]
        try:
            for index, block in enumerate(self._blocks):
                if index == stop_before:
                    block.forward = _stop_before
                elif index < first:
                    is_last = index == len(self._blocks) - 1
                    block.forward = self._pass_through(hidden if is_last else None)
                else:
                    given = hidden if index == first else None
                    stops = index == stop_after
                    block.forward = self._wrap(block.forward, given, stops=stops)
            yield
        finally:
            for block, override in zip(self._blocks, overrides, strict=True):
                if override is None:
                    del block.forward  # uncovers the method of the class
                else:
                    block.forward = override

    def _pass_through(self, given: Tensor | None) -> Callable[..., Any]:
        """Return a forward method that returns its input, or the given states instead."""

        def skip(*args: Any, **kwargs: Any) -> Any:
            states = _states(args, kwargs) if given is None else given
            return (states,) if self._returns_tuples else states

        return skip

    def _wrap(
        self, forward: Callable[..., Any], given: Tensor | None, *, stops: bool
    ) -> Callable[..., Any]:
        """Return a forward method that runs the block, on the given states if there are any."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if given is not None:
                if args:
                    args = (given, *args[1:])
                else:
                    kwargs = {**kwargs, "hidden_states": given}
            output = forward(*args, **kwargs)
            self._returns_tuples = isinstance(output, tuple)
            if stops:
                raise StopForward(output[0] if isinstance(output, tuple) else output)
            return output

        return run


@contextmanager
def before_each_call(
    module: nn.Module, hook: Callable[[nn.Module, tuple[Any, ...]], Any]
) -> Iterator[None]:
    """Call a hook before each call of a module; it may return other arguments, or raise."""
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def stop_with_input(_: nn.Module, args: tuple[Any, ...]) -> None:
    """End the forward pass with the first argument of the module that is about to be called."""
    raise StopForward(args[0])


def _stop_before(*args: Any, **kwargs: Any) -> Any:
    raise StopForward(_states(args, kwargs))


def _states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    states: Tensor = args[0] if args else kwargs["hidden_states"]
    return states
