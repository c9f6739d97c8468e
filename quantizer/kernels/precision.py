"""In which dtype matrix products are computed."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def fastest_matmul_dtype(device: str) -> torch.dtype:
    """Return the dtype in which matrix products are fastest.

    Bfloat16 where the processor multiplies it itself, else float32.
    """
    if device.startswith("cuda"):
        return torch.bfloat16
    capable: Mapping[str, Any] = torch.cpu.get_capabilities()
    return (
        torch.bfloat16 if capable.get("avx512_bf16") or capable.get("amx_bf16") else torch.float32
    )


def matmul_autocast(precision: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context in which products of float32 matrices are computed in `precision`.

    All else stays in float32.

    Weights are cast for each product: cast ones that are kept would not follow weights that change
    within the context.
    """
    return (
        nullcontext()
        if precision == torch.float32
        else torch.autocast(device.type, dtype=precision, cache_enabled=False)
    )


def matmul_dtype(matrix: Tensor) -> torch.dtype:
    """Return the dtype in which products of a matrix are wanted.

    That of `matmul_autocast`, outside of it the matrix's own.
    """
    device = matrix.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else matrix.dtype
