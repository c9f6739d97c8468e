"""Which way packed weights are worked with, and why."""

import os
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

from quantizer.errors import KernelError

KERNELS_VARIABLE = "BITWRIGHT_KERNELS"
"""Environment variable: `auto`; `reference` to compute every product by the slow exact twin.

`triton` for kernels on a GPU.
"""
REFERENCE, CPU, GPU = "reference", "cpu", "triton"


@dataclass(frozen=True, slots=True)
class KernelPath:
    """A way to compute products.

    Attributes:
        name: `reference`, `cpu` or `triton`, after the modules `reference`, `cpu` and `gpu` of
            `quantizer.kernels`.
        reason: what decided.
    """

    name: str
    reason: str


def choose_kernel_path(device: str) -> KernelPath:
    """Return how products are computed on a device, `cpu` or `cuda`.

    Gradients always take expanded weights, as `reference` does.

    Raises:
        KernelError: the setting is none of `auto`, `reference` and `triton`, or Triton is asked for
            and not installed.
    """
    setting = os.environ.get(KERNELS_VARIABLE, "auto")
    if setting not in ("auto", REFERENCE, GPU):
        raise KernelError(f"{KERNELS_VARIABLE}={setting!r}: use auto, reference or triton")
    if setting == REFERENCE:
        return KernelPath(REFERENCE, f"{KERNELS_VARIABLE} asks for it")
    if device != "cpu":
        if setting != GPU:
            return KernelPath(
                REFERENCE,
                f"kernels for a GPU did not pass their tests on one yet; {KERNELS_VARIABLE}={GPU} takes "
                "them",
            )
        if not _installed("triton"):
            raise KernelError(
                f"{KERNELS_VARIABLE}={GPU}, but Triton is not installed: install bitwright[gpu]"
            )
        return KernelPath(GPU, f"{KERNELS_VARIABLE} asks for it")
    if not _installed("numba"):
        return KernelPath(REFERENCE, "numba is not installed")
    return KernelPath(CPU, "numba compiles loops over packed codes")


@cache
def _installed(library: str) -> bool:
    return find_spec(library) is not None
