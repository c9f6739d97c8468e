"""Promises of quantizer.models.gguf_header.

What a GGUF file cannot hold is refused, and nothing beside it is read.
"""

import struct
from pathlib import Path
from typing import Any

import pytest

from quantizer.errors import ModelError
from quantizer.models.gguf_header import check_gguf
from quantizer.models.source import find_model


def gguf_bytes(
    values: dict[str, tuple[int, bytes]] | None = None,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    tensors: tuple[bytes, ...] | None = None,
    data_bytes: int = 96,
) -> bytes:
    """Return a GGUF file: keys with type and encoded value, encoded tensor descriptions, zeros."""
    pairs = [
        gguf_text(key) + struct.pack("<I", kind) + value
        for key, (kind, value) in (values or {}).items()
    ]
    described = (
        tensors
        if tensors is not None
        else (gguf_tensor("a", [4, 4], 0, 0), gguf_tensor("b", [8], 0, 64))
    )
    head = (
        magic
        + struct.pack("<IQQ", version, *(counts or (len(described), len(pairs))))
        + b"".join([*pairs, *described])
    )
    return head + bytes(-len(head) % 32) + bytes(data_bytes)


def gguf_text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf_tensor(name: str, shape: list[int], kind: int, offset: int) -> bytes:
    return gguf_text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def gguf_list(kind: int, count: int, items: bytes) -> tuple[int, bytes]:
    return 9, struct.pack("<IQ", kind, count) + items


ALIGNMENT, BLOCKS = "general.alignment", "llama.block_count"

GGUF: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "beyond its end"),
    "magic": (gguf_bytes(magic=b"GGML"), "begins with b'GGML'"),
    "version": (gguf_bytes(version=4), "version 4"),
    "first version": (gguf_bytes(version=1), "version 1"),
    "big-endian": (gguf_bytes(version=3 << 24), "version 50331648"),
    "tensors": (gguf_bytes(counts=(2**63, 0)), "9223372036854775808 tensors"),
    "no tensors": (gguf_bytes(counts=(0, 0)), "0 tensors"),
    "values": (gguf_bytes(counts=(2, 2**40)), "1099511627776 values"),
    "more values than bytes": (gguf_bytes(counts=(2, 60_000)), "a name in it should have"),
    "long key": (
        gguf_bytes(tensors=(struct.pack("<Q", 2**60),)),
        "should have 1152921504606846976 bytes",
    ),
    "key is no text": (gguf_bytes(tensors=(struct.pack("<Q", 1) + b"\xff",)), "utf-8"),
    "long text": (gguf_bytes({"a": (8, struct.pack("<Q", 2**50))}), "beyond its end"),
    "unknown type": (gguf_bytes({"a": (13, b"")}), "unknown type 13"),
    "long list": (gguf_bytes({"a": gguf_list(0, 2**50, b"")}), "list of 1125899906842624 items"),
    "list beyond the file": (gguf_bytes({"a": gguf_list(12, 100_000, b"")}), "beyond its end"),
    "list of lists": (
        gguf_bytes({"a": gguf_list(9, 1, struct.pack("<IQ", 9, 1) * 100)}),
        "list of the unknown type 9",
    ),
    "many lists": (
        gguf_bytes({name: gguf_list(0, 3_000_000, bytes(3_000_000)) for name in "ab"}),
        "list of 3000000 items",
    ),
    "same key": (
        gguf_bytes(
            {"a": (0, b"\0" + gguf_text("a") + struct.pack("<I", 0) + b"\0")}, counts=(2, 2)
        ),
        "names 'a' twice",
    ),
    "no alignment": (gguf_bytes({ALIGNMENT: (4, struct.pack("<I", 0))}), "alignment is 0"),
    "coarse alignment": (
        gguf_bytes({ALIGNMENT: (4, struct.pack("<I", 128))}),
        "not there or not its own",
    ),
    "fraction": (gguf_bytes({ALIGNMENT: (6, struct.pack("<f", float("inf")))}), "alignment is inf"),
    "layers": (
        gguf_bytes({BLOCKS: (4, struct.pack("<I", 2**31))}),
        "block_count is 2147483648, more than its 2 tensors",
    ),
    "dimensions": (gguf_bytes(tensors=(gguf_tensor("a", [1] * 5, 0, 0),)), "has 5 dimensions"),
    "empty shape": (gguf_bytes(tensors=(gguf_tensor("a", [0, 4], 0, 0),)), "impossible shape"),
    "overflow": (gguf_bytes(tensors=(gguf_tensor("a", [2**40, 2**40], 0, 0),)), "impossible shape"),
    "block": (gguf_bytes(tensors=(gguf_tensor("a", [31], 2, 0),)), "impossible shape"),
    "kind": (gguf_bytes(tensors=(gguf_tensor("a", [4], 4, 0),)), "unknown type 4"),
    "same tensor": (
        gguf_bytes(tensors=(gguf_tensor("a", [8], 0, 0), gguf_tensor("a", [8], 0, 32))),
        "names 'a' twice",
    ),
    "overlap": (
        gguf_bytes(tensors=(gguf_tensor("a", [16], 0, 0), gguf_tensor("b", [8], 0, 32))),
        "not there or not its own",
    ),
    "not aligned": (gguf_bytes(tensors=(gguf_tensor("a", [4], 0, 4),)), "not there or not its own"),
    "beyond": (gguf_bytes(tensors=(gguf_tensor("a", [25], 0, 0),)), "not there or not its own"),
    "far beyond": (
        gguf_bytes(tensors=(gguf_tensor("a", [4], 0, 2**63),)),
        "not there or not its own",
    ),
}


@pytest.mark.parametrize("case", list(GGUF))
def test_a_gguf_header_that_cannot_be_is_refused_in_one_sentence(case: str, tmp_path: Path) -> None:
    content, reason = GGUF[case]
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=rf"model\.gguf' cannot be read: .*({reason})") as caught:
        find_model(str(file), tmp_path / "cache", read_weights=False)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_a_gguf_header_that_can_be_is_accepted(tmp_path: Path) -> None:
    values = {
        "a": (8, gguf_text("text")),
        "b": gguf_list(8, 2, gguf_text("x") * 2),
        "c": gguf_list(6, 3, bytes(12)),
        "d": (12, bytes(8)),
    }
    (tmp_path / "model.gguf").write_bytes(gguf_bytes(values | {BLOCKS: (4, struct.pack("<I", 2))}))
    assert check_gguf(tmp_path / "model.gguf") == 2


def llama_values(**numbers: int) -> dict[str, tuple[int, bytes]]:
    """Return the metadata of a llama."""
    sizes = {
        "context_length": 32,
        "embedding_length": 8,
        "feed_forward_length": 8,
        "block_count": 1,
    } | numbers
    sizes |= {"attention.head_count": 2, "attention.head_count_kv": 2, "vocab_size": 4}
    values = {f"llama.{name}": (4, struct.pack("<I", number)) for name, number in sizes.items()}
    tokens = gguf_list(8, 4, b"".join(gguf_text(text) for text in "abcd"))
    epsilon = {
        "llama.attention.layer_norm_rms_epsilon": (6, struct.pack("<f", 1e-5)),
        "tokenizer.ggml.tokens": tokens,
    }
    return {"general.architecture": (8, gguf_text("llama")), **values, **epsilon}


LLAMA_TENSORS = (
    gguf_tensor("token_embd.weight", [8, 4], 0, 0),
    gguf_tensor("output_norm.weight", [8], 0, 128),
)


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        ({}, "lacks 9 tensors"),
        ({"feed_forward_length": 2**31}, "51539607.* weights by its configuration"),
    ],
)
def test_a_gguf_file_that_lacks_weights_is_not_converted(
    numbers: dict[str, int], reason: str, tmp_path: Path
) -> None:
    (tmp_path / "model.gguf").write_bytes(
        gguf_bytes(llama_values(**numbers), tensors=LLAMA_TENSORS, data_bytes=4000)
    )
    with pytest.raises(ModelError, match=reason):
        find_model(str(tmp_path / "model.gguf"), tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_what_lies_beside_a_gguf_file_is_not_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from transformers import AutoConfig

    seen: list[list[str]] = []

    def read(place: Path, **_: Any) -> None:
        seen.append([path.name for path in place.iterdir()])
        raise ValueError("seen")

    monkeypatch.setattr(AutoConfig, "from_pretrained", read)
    (tmp_path / "model.gguf").write_bytes(gguf_bytes())
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match="seen"):
        find_model(str(tmp_path / "model.gguf"), tmp_path / "cache", read_weights=False)
    assert seen == [["model.gguf"]]


@pytest.mark.parametrize("name", ["llama-00002-of-00003.gguf", "renamed.gguf"])
def test_a_part_of_a_split_file_is_refused_with_what_to_do(name: str, tmp_path: Path) -> None:
    part, empty = tmp_path / name, tmp_path / "empty.gguf"
    count = {"split.count": (2, struct.pack("<H", 3))}
    part.write_bytes(gguf_bytes(count))
    empty.write_bytes(gguf_bytes(count, tensors=()))
    for file in (part, empty):
        with pytest.raises(ModelError, match=r"is split; merge it first: `llama-gguf-split") as err:
            find_model(str(file), tmp_path / "cache", read_weights=False)
        assert str(file) in str(err.value)
    with pytest.raises(ModelError, match=r"--merge \S*\.gguf merged\.gguf"):
        check_gguf(part)


def test_the_command_for_a_split_file_names_its_first_part(tmp_path: Path) -> None:
    part = tmp_path / "llama-00002-of-00003.gguf"
    part.write_bytes(gguf_bytes())
    with pytest.raises(ModelError, match=r"--merge llama-00001-of-00003\.gguf merged\.gguf"):
        check_gguf(part)


def test_a_file_that_is_split_into_one_part_is_whole(tmp_path: Path) -> None:
    whole = tmp_path / "whole.gguf"
    whole.write_bytes(gguf_bytes({"split.count": (2, struct.pack("<H", 1))}))
    assert check_gguf(whole) == 2
