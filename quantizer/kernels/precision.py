"""The dtype in which matrix products are computed."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def fastest_matmul_dtype(device: str) -> torch.dtype:
    """Return the dtype in which a device multiplies matrices fastest.

    It is bfloat16 on GPUs and on CPUs with instructions for it (AVX512-BF16, AMX), else float32.
    """
    if device.startswith("cuda"):
        return torch.bfloat16
    capable: Mapping[str, Any] = torch.cpu.get_capabilities()
    return (
        torch.bfloat16 if capable.get("avx512_bf16") or capable.get("amx_bf16") else torch.float32
    )


def matmul_autocast(precision: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context in which products of float32 matrices are computed in `precision`.

    Everything else stays in float32. Weights are cast anew for each product: autocast's cache of
    cast weights would not follow weights that change within the context.
    """
    return (
        nullcontext()
        if precision == torch.float32
        else torch.autocast(device.type, dtype=precision, cache_enabled=False)
    )


def matmul_dtype(matrix: Tensor) -> torch.dtype:
    """Return the dtype in which products of a matrix are to be computed.

    Inside `matmul_autocast` it is the context's dtype, outside the matrix's own.
    """
    device = matrix.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else matrix.dtype
