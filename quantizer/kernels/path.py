"""Which way packed weights are worked with, and why."""

import os
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

from quantizer.errors import KernelError

SETTING = "BITWRIGHT_KERNELS"
"""Environment variable: `auto`; `reference` to compute every product by the slow exact twin.

`triton` for kernels on a GPU.
"""
REFERENCE, CPU, GPU = "reference", "cpu", "triton"


@dataclass(frozen=True, slots=True)
class Path:
    """A way to compute products.

    Attributes:
        name: `reference`, `cpu` or `triton`, after the modules `reference`, `cpu` and `gpu` of
            `quantizer.kernels`.
        why: what decided.
    """

    name: str
    why: str


def choose_path(device: str) -> Path:
    """Return how products are computed on a device, `cpu` or `cuda`.

    Gradients always take expanded weights, as `reference` does.

    Raises:
        KernelError: the setting is none of `auto`, `reference` and `triton`, or Triton is asked for
            and not installed.
    """
    setting = os.environ.get(SETTING, "auto")
    if setting not in ("auto", REFERENCE, GPU):
        raise KernelError(f"{SETTING}={setting!r}: use auto, reference or triton")
    if setting == REFERENCE:
        return Path(REFERENCE, f"{SETTING} asks for it")
    if device != "cpu":
        if setting != GPU:
            return Path(
                REFERENCE,
                f"kernels for a GPU did not pass their tests on one yet; {SETTING}={GPU} takes "
                "them",
            )
        if not _installed("triton"):
            raise KernelError(
                f"{SETTING}={GPU}, but Triton is not installed: install bitwright[gpu]"
            )
        return Path(GPU, f"{SETTING} asks for it")
    if not _installed("numba"):
        return Path(REFERENCE, "numba is not installed")
    return Path(CPU, "numba compiles loops over packed codes")


@cache
def _installed(library: str) -> bool:
    return find_spec(library) is not None
