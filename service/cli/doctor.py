"""The command `doctor`: what this machine offers for quantization, or what a model is made of."""

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
from cyclopts import Parameter

from quantizer.kernels.path import choose_kernel_path
from service import single_stages
from service.cli.console import print_pairs
from service.cli.parameters import AsJson
from service.settings import default_cache
from service.storage.cache_entry import read_entries
from service.storage.cache_limit import default_limit, read_limit
from service.storage.stage_store import StageStore

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

ModelReference = Annotated[
    str | None, Parameter(help="A model folder, GGUF file or Hugging Face id to look into.")
]


def doctor(model: ModelReference = None, /, *, as_json: AsJson = False) -> None:
    """Show versions, processor, memory, GPU and cache; or what can be quantized in a model."""
    cache = default_cache()
    if model is None:
        print_pairs(examine(cache), as_json=as_json)
    else:
        print_pairs(single_stages.describe_model(model, StageStore(cache)), as_json=as_json)


def examine(cache: Path) -> dict[str, Any]:
    """Return versions, processor, memory, GPU and cache, as JSON values; what is missing is null.

    Before the first use of the cache, its limit is the one that it would get now.
    """
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    device = "cuda" if gpu else "cpu"
    path = choose_kernel_path(device)
    limit = read_limit(cache)
    entries = read_entries(cache) if cache.is_dir() else []
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
        "cache_bytes": sum(entry.size_bytes for entry in entries),
        "cache_limit_bytes": default_limit(cache) if limit is None else limit,
        "cache_free_bytes": shutil.disk_usage(nearest).free,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
