"""Write tensors into safetensors files of limited size, as transformers reads them."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import safetensors.torch
from torch import Tensor

from quantizer.durable import system_errors

SHARD_BYTES = 5 * 10**9
"""Largest weight file; one is in memory at a time."""


def write_tensors(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES
) -> None:
    """Write tensors into `model.safetensors`, or into shards and their index.

    Args:
        folder: where to write.
        tensors: names and tensors; each is read when its shard is written.
        shard_bytes: largest size of a file, unless one tensor is larger.

    Raises:
        OSError: the disk is full or fails.
    """
    parts: list[tuple[Path, list[str]]] = []
    total_bytes = 0
    for shard in _shards(tensors, shard_bytes):
        file = folder / f"part-{len(parts)}"
        _save(shard, file)
        parts.append((file, list(shard)))
        total_bytes += sum(tensor.nbytes for tensor in shard.values())
    if len(parts) == 1:
        parts[0][0].rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, (file, names) in enumerate(parts, 1):
        shard_name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        file.rename(folder / shard_name)
        weight_map |= dict.fromkeys(names, shard_name)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    text = json.dumps(index, indent=1) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _shards(tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    with system_errors(file):
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
