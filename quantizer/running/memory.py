"""What fits into a graphics card's memory.

Models, and windows that are run at once, found out by failing.
"""

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from quantizer.errors import MemoryShort

log = logging.getLogger("bitwright")

R = TypeVar("R")
M = TypeVar("M", bound=nn.Module)


def to_device(model: M, device: str) -> M:
    """Return the model after moving it to a device.

    Raises:
        MemoryShort: it does not fit.
    """
    try:
        return model.to(device)
    except torch.OutOfMemoryError as error:
        size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        raise MemoryShort(
            f"the model's {size} bytes do not fit on device {device!r} ({_first_line(error)}): "
            "use a larger one, or the processor"
        ) from error


class MicroBatches:
    """Runs work on windows: all of them at once, or as many as it is told, and where memory is short half as many from then on."""

    def __init__(self, most: int | None = None) -> None:
        """Know of no limit yet but the given one."""
        self._most = most

    def run(
        self, work: Callable[[slice], R], windows: int, undo: Callable[[], None] | None = None
    ) -> list[R]:
        """Return the results of `work` on each piece of 0 .. windows-1, in order.

        Args:
            work: what to do with some of the windows.
            windows: how many there are, above 0.
            undo: takes back all that pieces have left behind, the one that failed included; then
                all are done again. None is for work that leaves nothing behind when it fails: then
                only that piece is.

        Raises:
            MemoryShort: not even one window fits.
        """
        results: list[R] = []
        at = 0
        while at < windows:
            size = min(self._most or windows, windows - at)
            try:
                results.append(work(slice(at, at + size)))
            except torch.OutOfMemoryError as error:
                self._halve(size, error)
                if undo is not None:
                    undo()
                    results, at = [], 0
            else:
                at += size
        return results

    def cat(self, work: Callable[[slice], Tensor], windows: int) -> Tensor:
        """Return the results of `work`, tensors of as many rows as the piece has windows, as one.

        See `run`.
        """
        found = self.run(work, windows)
        return found[0] if len(found) == 1 else torch.cat(found)

    def _halve(self, size: int, error: torch.OutOfMemoryError) -> None:
        if size == 1:
            raise MemoryShort(
                f"the device has too little memory for one window ({_first_line(error)}): use "
                "fewer tokens in a window, "
                "a larger device, or the processor"
            ) from error
        self._most = -(-size // 2)
        log.warning("too little memory for %d windows at once; %d are taken", size, self._most)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
