"""Run compiled loops on several threads; they release the interpreter's lock."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

T = TypeVar("T")


def thread_count(*, worthwhile: bool) -> int:
    """Return the number of threads to use: PyTorch's if the work is worth sharing, else 1."""
    return torch.get_num_threads() if worthwhile else 1


def run_on_threads(work: Callable[[T], None], items: Sequence[T], threads: int) -> None:
    """Call `work` on every item, on so many threads."""
    if threads == 1:
        for item in items:
            work(item)
    else:
        list(_pool(os.getpid(), threads).map(work, items))


@cache
def _pool(_: int, threads: int) -> ThreadPoolExecutor:
    """Return the threads of a process, by its id: a forked process has none of its parent's."""
    return ThreadPoolExecutor(threads, thread_name_prefix="bitwright-kernel")
