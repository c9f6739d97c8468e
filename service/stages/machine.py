"""The device and dtype that models run on."""

import importlib.metadata
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from quantizer.kernels.path import choose_kernel_path
from quantizer.kernels.precision import fastest_matmul_dtype
from quantizer.running.runner import BlockRunner
from service.errors import RequestError

CPU = "cpu"
_COMPUTING = ("torch", "transformers", "numpy", "numba")
"""Packages whose versions decide the results of stages that run a model."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Where models run.

    Attributes:
        device: `cpu` or `cuda`.
        dtype: of parameters and hidden states.
        threads: of PyTorch and of the kernels; sums are split among them, so they decide the last
            digits of results.
    """

    device: str
    dtype: torch.dtype
    threads: int = field(default_factory=torch.get_num_threads)

    @property
    def precision(self) -> torch.dtype:
        """The dtype of matrix products while layers are measured, quantized and trained.

        Results are scored in `dtype`.
        """
        return fastest_matmul_dtype(self.device)

    def runner(self, model: Any) -> BlockRunner:
        """Return a runner of a model that was loaded for this machine."""
        return BlockRunner(model, self.precision)

    @classmethod
    def choose(cls, wanted: str) -> "Machine":
        """Return the machine for `auto`, `cpu` or `cuda`: float32 on a CPU, bfloat16 on a GPU.

        Raises:
            RequestError: `cuda` is wanted where torch finds no GPU.
        """
        device = wanted
        if wanted != "cpu":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if wanted == "cuda" and device != "cuda":
            raise RequestError("device 'cuda': torch finds no GPU here; give cpu or auto")
        return cls(device, torch.bfloat16 if device == "cuda" else torch.float32)

    def inputs(self) -> dict[str, Any]:
        """Return what of the machine decides the results of a stage, for its hash."""
        found: dict[str, Any] = {
            "device": self.device,
            "dtype": str(self.dtype),
            "products": str(self.precision),
            "kernels": choose_kernel_path(self.device).name,
            "versions": versions_of(_COMPUTING),
        }
        if self.device == CPU:
            found["threads"] = self.threads
            found["instructions"] = torch.backends.cpu.get_cpu_capability()
        else:
            found["versions"] |= versions_of(["triton"])
        return found


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of packages that are installed."""
    found = {}
    for name in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
