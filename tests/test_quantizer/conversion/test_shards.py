"""Promises of quantizer.conversion.shards: one file, or shards that transformers can follow."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from quantizer.conversion.shards import write_tensors
from quantizer.models.weight_files import find_weight_files

TENSORS = {f"t{at}": torch.full((10,), float(at)) for at in range(7)}  # 40 bytes each


def read(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in find_weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            assert tensors.metadata() == {"format": "pt"}
            found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize(("shard_bytes", "files"), [(280, 1), (279, 2), (100, 4), (40, 7), (1, 7)])
def test_files_are_no_larger_than_asked_and_hold_all_tensors(
    shard_bytes: int, files: int, tmp_path: Path
) -> None:
    write_tensors(tmp_path, TENSORS.items(), shard_bytes)
    assert len(find_weight_files(tmp_path)) == files
    found = read(tmp_path)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (files > 1)
    if files > 1:
        assert json.loads(index.read_text())["metadata"] == {"total_size": 280}


def test_a_file_that_cannot_be_written_is_an_error_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "part-0").mkdir()
    with pytest.raises(OSError, match="part-0"):
        write_tensors(tmp_path, TENSORS.items())
