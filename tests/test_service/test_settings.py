"""Promises of service.process that only a process of its own can show."""

import subprocess
import sys

import pytest

_FAULTS = """
import resource, sys
import torch
from service.process import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def work():
    for megabytes in (100, 60, 20, 100):
        torch.ones(megabytes << 20, dtype=torch.uint8)
for _ in range(4):  # until the pieces have found their places
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(way: str) -> int:
    return int(
        subprocess.run(
            [sys.executable, "-c", _FAULTS, way], capture_output=True, text=True, check=True
        ).stdout
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_memory_is_kept_for_the_next_tensor() -> None:
    usual, keeping = _faults("usual"), _faults("keep")
    assert usual > 50_000  # 280 MiB in pages of 4 KiB
    assert keeping < 1000
