"""Memoized tensors are computed once, and again only if they are missing or damaged."""

from pathlib import Path

import torch
from torch import Tensor

from quantizer.durable import PartStore
from quantizer.running.memoized import memoized


def test_tensors_are_computed_once_and_read_back_exactly(tmp_path: Path) -> None:
    calls: list[int] = []

    def compute() -> dict[str, Tensor]:
        calls.append(1)
        matrix = torch.arange(6.0, dtype=torch.float64).view(2, 3)
        return {"transposed": matrix.t(), "codes": torch.tensor([1, 2], dtype=torch.int32)}

    first = memoized(PartStore(tmp_path), "part", compute)
    second = memoized(PartStore(tmp_path), "part", compute)
    assert calls == [1]
    assert set(first) == {"transposed", "codes"}
    for name, tensor in compute().items():
        assert torch.equal(first[name], tensor)
        assert torch.equal(second[name], tensor)
        assert first[name].dtype == tensor.dtype


def test_parts_with_other_names_are_computed_separately(tmp_path: Path) -> None:
    store = PartStore(tmp_path)
    values = [
        float(memoized(store, name, lambda at=at: {"value": torch.tensor(at)})["value"])
        for at, name in enumerate(("a", "b"))
    ]
    assert values == [0, 1]


def test_a_damaged_part_is_computed_again(tmp_path: Path) -> None:
    store = PartStore(tmp_path)
    memoized(store, "part", lambda: {"value": torch.zeros(3)})
    (path,) = store.paths()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert memoized(store, "part", lambda: {"value": torch.ones(3)})["value"].tolist() == [1] * 3
