"""The device and dtype that models run on."""

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from quantizer.kernels.precision import fastest_matmul_dtype
from quantizer.running.runner import BlockRunner
from service.errors import RequestError


@dataclass(frozen=True, slots=True)
class Machine:
    """Where models run.

    Attributes:
        device: `cpu` or `cuda`.
        dtype: of parameters and hidden states.
    """

    device: str
    dtype: torch.dtype

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

    def inputs(self) -> dict[str, str]:
        """Return what of the machine decides the results of a stage, for its hash."""
        return {
            "device": self.device,
            "dtype": str(self.dtype),
            "products": str(self.precision),
            "torch": version("torch"),
        }
