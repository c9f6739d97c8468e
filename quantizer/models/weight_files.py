"""The weight files of a model folder: which ones count, and what must hold of their tensors."""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from quantizer.errors import ModelError
from quantizer.models.files import abbreviated, file_inside, read_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
INDEX_BYTES = 32_000_000
"""Limit of an index."""

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_SHARD_NAME = re.compile(r"[^/\\\0]+\.safetensors")


def find_weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that transformers would load from a folder.

    A single file goes before the shards of an index. The same weights in another form beside them,
    such as `consolidated.safetensors`, `original/` or `pytorch_model.bin`, do not count.

    Raises:
        ModelError: there are none, one is missing, lies elsewhere, or was not downloaded
            completely.
    """
    for name in (SINGLE, INDEX):
        if (folder / name).is_symlink() and not _is_there(folder / name):
            raise incomplete(folder, name)
    if _is_there(folder / SINGLE):
        return [file_inside(folder, SINGLE)]
    if _is_there(folder / INDEX):
        return read_shards(folder, folder / INDEX)
    names = [path.name for path in folder.iterdir()]
    in_cache = _snapshots_of(folder) is not None and not _pickled(names)
    if in_cache or unfinished_downloads(folder):
        raise incomplete(folder, SINGLE)
    raise no_weights(f"folder {str(folder)!r}", names)


def no_weights(place: str, names: Iterable[str]) -> ModelError:
    """Return the error about a place without weights, of which the names of files are known."""
    pickled = _pickled(names)
    if pickled:
        return ModelError(
            f"{place} holds pickled weights only ({pickled[0]}); loading them can run any code. "
            "Convert them to safetensors"
        )
    return ModelError(f"{place} has no weights: neither {SINGLE} nor an index of shards")


def _pickled(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if any(fnmatchcase(name, pattern) for pattern in _PICKLED))


def incomplete(folder: Path, name: str, named_by: str = "") -> ModelError:
    """Return the error about a file that a folder lacks though it belongs to its model."""
    by = f", which {named_by} names" if named_by else ""
    left = unfinished_downloads(folder)
    also = f"; a download was interrupted and left {left[0].name!r}" if left else ""
    return ModelError(
        f"folder {str(folder)!r} is incomplete: it lacks {abbreviated(name)}{by}{also}; download "
        "the model again"
    )


def unfinished_downloads(folder: Path) -> list[Path]:
    """Return what interrupted downloads left of files of a folder.

    It is in the folder itself, or where the library of the hub keeps it: in `.cache/huggingface`,
    or with the blobs of the hub's cache.
    """
    places = [folder, folder / ".cache" / "huggingface" / "download"]
    snapshots = _snapshots_of(folder)
    if snapshots is not None:
        places.append(snapshots.parent / "blobs")
    return sorted(path for place in places for path in place.glob("*.incomplete"))


def read_shards(folder: Path, index: Path) -> list[Path]:
    """Return the weight files that an index names, each once, sorted by name.

    Raises:
        ModelError: see `shard_names`, or a file that it names is missing or lies elsewhere.
    """
    names = shard_names(file_inside(folder, index.name))
    for name in names:
        if not _is_there(folder / name):
            raise incomplete(folder, name, index.name)
    return [file_inside(folder, name) for name in names]


def shard_names(index: Path) -> list[str]:
    """Return the names of the weight files that an index names, each once, sorted.

    Raises:
        ModelError: the file is not an index, or names what is not a safetensors file beside it.
    """
    named = read_object(index, INDEX_BYTES).get("weight_map")
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
    return sorted(set(named.values()))


def _snapshots_of(folder: Path) -> Path | None:
    """Return the folder of snapshots that a folder of the hub's cache is in; None for others."""
    parent = folder.resolve().parent
    return parent if parent.name == "snapshots" else None


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False  # no file system could hold such a name


def check_tensors(file: Path, *, read_values: bool) -> None:
    """Check that safetensors opens a file and, if `read_values`, that all values are usable.

    Raises:
        ModelError: the file is damaged, or a tensor holds NaN or infinite values.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys() if read_values else ():
                _check_values(file, name, tensors.get_tensor(name))
    except (SafetensorError, OSError, RuntimeError) as err:
        raise ModelError(f"weights {str(file)!r} are damaged or truncated: {err}") from err


def _check_values(file: Path, name: str, tensor: torch.Tensor) -> None:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise ModelError(
            f"tensor {name!r} in {str(file)!r} holds NaN or infinite values; download or export "
            "the weights again"
        )
