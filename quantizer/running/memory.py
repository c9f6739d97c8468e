"""Fit models, and windows that run together, into the memory of a device.

How much fits is found out by trying: an attempt that runs out of memory is repeated with less.
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
    """Runs work on as many windows at once as fit into memory.

    Each time that memory runs out, the number of windows is halved; later work starts from there.
    """

    def __init__(self, limit: int | None = None) -> None:
        """Start with at most `limit` windows at once, or with all of them."""
        self._limit = limit

    def run(
        self, work: Callable[[slice], R], windows: int, undo: Callable[[], None] | None = None
    ) -> list[R]:
        """Return the results of `work` on consecutive micro-batches of windows 0 .. windows-1.

        Args:
            work: processes the windows of a slice.
            windows: number of windows, above 0.
            undo: discards the side effects of all micro-batches, the failed one included; all are
                then processed again. None for work without side effects: then only the failed
                micro-batch is processed again.

        Raises:
            MemoryShort: not even one window fits.
        """
        results: list[R] = []
        start = 0
        while start < windows:
            size = min(self._limit or windows, windows - start)
            try:
                results.append(work(slice(start, start + size)))
            except torch.OutOfMemoryError as error:
                self._halve(size, error)
                if undo is not None:
                    undo()
                    results = []
                    start = 0
            else:
                start += size
        return results

    def cat(self, work: Callable[[slice], Tensor], windows: int) -> Tensor:
        """Return the results of `work`, tensors with one row for each window, as one tensor.

        See `run`.
        """
        results = self.run(work, windows)
        return results[0] if len(results) == 1 else torch.cat(results)

    def _halve(self, size: int, error: torch.OutOfMemoryError) -> None:
        if size == 1:
            raise MemoryShort(
                f"the device has too little memory for one window ({_first_line(error)}): use "
                "fewer tokens in a window, a larger device, or the processor"
            ) from error
        self._limit = -(-size // 2)
        log.warning(
            "too little memory for %d windows at once; continuing with %d", size, self._limit
        )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
