"""Share work over the cores of a CPU, one item for each core."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def core_count(device: torch.device) -> int:
    """Return how many items a device works on at once: one for each core of a CPU, else one."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def map_on_cores(work: Callable[[T], R], items: Sequence[T], device: torch.device) -> list[R]:
    """Return `work` of each item, in order.

    On a CPU, each core works on an item of its own. Quantizing is many small operations: threads
    that share one of them wait for each other more than they work, above all when another program
    uses one of the cores.

    While this runs on a CPU, PyTorch uses one thread for each operation everywhere in the process,
    as `torch.set_num_threads` is a setting of the process. It is restored at the end. Two calls
    must not run at the same time.

    Args:
        work: called on each item, from several threads.
        items: the items.
        device: where the tensors of the items are.
    """
    threads = core_count(device)
    if threads == 1:
        return [work(item) for item in items]
    with _one_thread_for_each_operation(), ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, items))


@contextmanager
def _one_thread_for_each_operation() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
