"""Which implementation works with packed weights, and why."""

import os
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

from quantizer.errors import KernelError

KERNELS_VARIABLE = "BITWRIGHT_KERNELS"
"""Environment variable that chooses the implementation.

`auto`, the default; `reference` for plain PyTorch everywhere; `triton` for Triton kernels on a GPU.
"""
REFERENCE = "reference"
CPU = "cpu"
GPU = "triton"


@dataclass(frozen=True, slots=True)
class KernelPath:
    """One implementation of products, packing and rounding.

    Attributes:
        name: `REFERENCE` (plain PyTorch), `CPU` (numba) or `GPU` (Triton).
        reason: what decided, for messages.
    """

    name: str
    reason: str


def choose_kernel_path(device: str) -> KernelPath:
    """Return the implementation for a device.

    Each product asks here, and the environment variable is read at every call: so a process can
    compare implementations by turns, and tensors can move to another device. That is 5 % of the
    time of a product of one row with a 64 x 64 layer, and less of larger ones.

    Args:
        device: type of the device, `cpu` or `cuda`.

    Raises:
        KernelError: the variable is none of `auto`, `reference` and `triton`, or asks for Triton
            where Triton is not installed.
    """
    setting = os.environ.get(KERNELS_VARIABLE, "auto")
    if setting not in ("auto", REFERENCE, GPU):
        raise KernelError(f"{KERNELS_VARIABLE}={setting!r}: use auto, reference or triton")
    if setting == REFERENCE:
        return KernelPath(REFERENCE, f"{KERNELS_VARIABLE} asks for it")
    return _cpu_path() if device == "cpu" else _gpu_path(setting)


def _cpu_path() -> KernelPath:
    if not _installed("numba"):
        return KernelPath(REFERENCE, "numba is not installed")
    return KernelPath(CPU, "numba compiles loops over packed codes")


def _gpu_path(setting: str) -> KernelPath:
    if setting != GPU:
        return KernelPath(
            REFERENCE,
            "the Triton kernels have not passed their tests on a GPU yet; "
            f"{KERNELS_VARIABLE}={GPU} uses them",
        )
    if not _installed("triton"):
        raise KernelError(
            f"{KERNELS_VARIABLE}={GPU}, but Triton is not installed: install bitwright[gpu]"
        )
    return KernelPath(GPU, f"{KERNELS_VARIABLE} asks for it")


@cache
def _installed(library: str) -> bool:
    return find_spec(library) is not None
