"""The weight files of a model folder: which ones count, and what must hold of their tensors."""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from quantizer.errors import ModelError
from quantizer.models.files import abbreviated, file_inside, read_object

_INDEX_BYTES = 32_000_000
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_SHARD_NAME = re.compile(r"[^/\\\0]+\.safetensors")


def find_weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that transformers would load from a folder.

    A single file goes before the shards of an index.

    Raises:
        ModelError: there are none, or a shard is missing or lies elsewhere.
    """
    single = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if single.exists():
        return [file_inside(folder, single.name)]
    if index.exists():
        return read_shards(folder, index)
    pickled = sorted(file.name for pattern in _PICKLED for file in folder.glob(pattern))
    if pickled:
        raise ModelError(
            f"folder {str(folder)!r} holds pickled weights only ({pickled[0]}); loading them can "
            "run any code. Convert them to safetensors"
        )
    raise ModelError(
        f"folder {str(folder)!r} has no weights: neither model.safetensors nor an index of shards"
    )


def read_shards(folder: Path, index: Path) -> list[Path]:
    """Return the weight files that an index names, each once, sorted by name.

    Raises:
        ModelError: the file is not an index, or names a file that is missing, lies elsewhere, or is
            not a safetensors file.
    """
    named = read_object(file_inside(folder, index.name), _INDEX_BYTES).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise ModelError(
            f"{str(index)!r} is not a safetensors index: it has no weight_map with tensors"
        )
    for name in named.values():
        if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
            raise ModelError(
                f"{str(index)!r} is not a safetensors index: it names {abbreviated(name)}, no "
                "safetensors file beside it"
            )
    return [file_inside(folder, name) for name in sorted(set(named.values()))]


def check_tensors(file: Path, *, read_values: bool) -> None:
    """Check that safetensors opens a file and, if `read_values`, that all values are usable.

    Raises:
        ModelError: the file is damaged, a tensor holds NaN or infinite values, or is stored in
            floats of 8 bits.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys() if read_values else ():
                _check_values(file, name, tensors.get_tensor(name))
    except (SafetensorError, OSError, RuntimeError) as err:
        raise ModelError(f"weights {str(file)!r} are damaged or truncated: {err}") from err


def _check_values(file: Path, name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_floating_point():
        return
    if tensor.element_size() == 1:
        raise ModelError(
            f"tensor {name!r} in {str(file)!r} is stored in 8 bits; give the original in 16 bits "
            "or more"
        )
    if not bool(torch.isfinite(tensor).all()):
        raise ModelError(
            f"tensor {name!r} in {str(file)!r} holds NaN or infinite values; download or export "
            "the weights again"
        )


def stored_dtype(config: dict[str, Any], weights: list[Path]) -> str:
    """Return the name of the dtype in which weights are stored, such as `bfloat16`.

    The configuration says it, or else the first tensor of the first file does.

    Raises:
        ModelError: that file holds no tensors.
    """
    named = config.get("dtype") or config.get("torch_dtype")
    dtype = getattr(torch, named, None) if isinstance(named, str) else None
    if isinstance(named, str) and isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return named
    with safe_open(weights[0], framework="pt") as tensors:
        names = list(tensors.keys())
        if not names:
            raise ModelError(f"weights {str(weights[0])!r} hold no tensors")
        return str(tensors.get_tensor(names[0]).dtype).removeprefix("torch.")
