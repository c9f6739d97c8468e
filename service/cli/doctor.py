"""What a machine offers for quantization."""

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = (
    "bitwright",
    "torch",
    "transformers",
    "cvxpy",
    "osqp",
    "numpy",
    "numba",
    "safetensors",
    "triton",
)


def examine(cache: Path) -> dict[str, Any]:
    """Return versions, processor, memory, GPU and cache, as JSON values.

    What is missing is null.
    """
    import psutil  # noqa: PLC0415
    import torch  # noqa: PLC0415

    from quantizer.kernels.path import choose_kernel_path  # noqa: PLC0415

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    device = "cuda" if gpu else "cpu"
    path = choose_kernel_path(device)
    nearest = next(folder for folder in (cache, *cache.parents) if folder.exists())
    return {
        "python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": gpu,
        "device": device,
        "kernels": f"{path.name}: {path.reason}",
        "cache": str(cache),
        "cache_free_bytes": shutil.disk_usage(nearest).free,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
