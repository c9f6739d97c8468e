"""The forward pass of a decoder model, with only some of its blocks.

The model's own forward pass runs, and the blocks outside the wanted part pass their input through
unchanged. So masks, positions and whatever else an architecture gives to its blocks are right, and
this module knows nothing of them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
        self._forms: dict[int, OutputForm] = {}
        """Form of each block's output, by index; of those that have run."""

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
        self._learn_forms(input_ids, first)
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
        self._learn_forms(input_ids, len(self._blocks))
        with self._replaced_blocks(len(self._blocks), None, None, None):
            return self._model(input_ids=input_ids, use_cache=False)

    def _learn_forms(self, input_ids: Tensor, end: int) -> None:
        """Run the blocks before `end` on one token, once, to see how each returns its output.

        Later blocks do not run, so hooks on their layers are not called.
        """
        if end > 0 and end - 1 not in self._forms:
            with torch.no_grad():
                self.run(input_ids[:1, :1], stop_after=end - 1)

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
                    block.forward = self._pass_through(index, hidden if is_last else None)
                else:
                    given = hidden if index == first else None
                    stops = index == stop_after
                    block.forward = self._wrap(index, block.forward, given, stops=stops)
            yield
        finally:
            for block, override in zip(self._blocks, overrides, strict=True):
                if override is None:
                    vars(block).pop("forward", None)  # uncovers the method of the class
                else:
                    block.forward = override

    def _pass_through(self, index: int, given: Tensor | None) -> Callable[..., Any]:
        """Return a forward method that returns its input, or the given states instead."""

        def skip(*args: Any, **kwargs: Any) -> Any:
            states = _states(args, kwargs) if given is None else given
            return self._forms[index].of(states)

        return skip

    def _wrap(
        self, index: int, forward: Callable[..., Any], given: Tensor | None, *, stops: bool
    ) -> Callable[..., Any]:
        """Return a forward method that runs the block, on the given states if there are any."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if given is not None:
                args, kwargs = _with_states(args, kwargs, given)
            output = forward(*args, **kwargs)
            self._forms[index] = OutputForm.find(output)
            if stops:
                raise StopForward(output[0] if isinstance(output, tuple | list) else output)
            return output

        return run


@dataclass(frozen=True, slots=True)
class OutputForm:
    """In which form a block returns its hidden states.

    Attributes:
        container: the class of the sequence whose first member they are; None for bare states.
        length: length of the sequence.
    """

    container: type[Any] | None
    length: int = 1

    @classmethod
    def find(cls, output: Any) -> "OutputForm":
        """Return the form of an output."""
        if isinstance(output, tuple | list):
            return cls(list if isinstance(output, list) else tuple, len(output))
        return cls(None)

    def of(self, states: Tensor) -> Any:
        """Return hidden states in this form; other members are None."""
        if self.container is None:
            return states
        return self.container([states, *[None] * (self.length - 1)])


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
    """Return the hidden states among the arguments of a block."""
    if args:
        states: Tensor = args[0]
    else:
        states = kwargs[_states_name(kwargs)]
    return states


def _with_states(
    args: tuple[Any, ...], kwargs: dict[str, Any], given: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a block with other hidden states."""
    if args:
        return (given, *args[1:]), kwargs
    return args, {**kwargs, _states_name(kwargs): given}


def _states_name(kwargs: dict[str, Any]) -> str:
    """Return the name under which a block gets its hidden states."""
    if "hidden_states" in kwargs:
        return "hidden_states"
    return next(
        name
        for name, each in kwargs.items()
        if isinstance(each, Tensor) and each.is_floating_point()
    )
