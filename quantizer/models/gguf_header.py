"""The header of a GGUF file, checked against the file before any library reads it.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

import hashlib
import re
import struct
from math import prod
from pathlib import Path
from typing import BinaryIO

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from quantizer.errors import ModelError
from quantizer.models.files import abbreviated
from quantizer.models.safetensors_header import MAX_HEADER_BYTES, MAX_TENSORS

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING = 8
_ARRAY = 9
_NUMBERS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<B",
    10: "<Q",
    11: "<q",
    12: "<d",
}
"""Formats of numbers and booleans, by the type that the header gives."""
_MAX_PAIRS = 65_536
_MAX_NAME_BYTES = 65_535
_MAX_ITEMS = 4_000_000
"""Limit of the items of all lists together, which readers turn into Python objects.

The largest vocabularies have half a million.
"""
_MAX_DIMENSIONS = 4
_MAX_NUMBER = 2**63 - 1
_ALIGNMENT = "general.alignment"
_DEFAULT_ALIGNMENT = 32
_MAX_ALIGNMENT = 1 << 20
_LAYERS = ".block_count"
_PARTS = "split.count"
_PART_NAME = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


def check_gguf(file: Path) -> int:
    """Return the number of tensors that the header of a GGUF file names, after checking the header.

    Only the header is read, and never more of it than `MAX_HEADER_BYTES`.

    Raises:
        ModelError: saying what is wrong; also that the file is one part of several.
    """
    return _checked(file)[0]


def header_sha256(file: Path) -> str:
    """Return the SHA-256 of the header of a GGUF file, after checking it as `check_gguf` does."""
    return _checked(file)[1]


def _checked(file: Path) -> tuple[int, str]:
    """Return the number of tensors, and the digest of the header."""
    if _PART_NAME.search(file.name):
        raise ModelError(_split(file))
    try:
        with file.open("rb") as stream:
            tensors = _Header(stream, file.stat().st_size).check()
            header_bytes = stream.tell()
            stream.seek(0)
            return tensors, hashlib.sha256(stream.read(header_bytes)).hexdigest()
    except _SplitError as err:
        raise ModelError(_split(file)) from err
    except (ValueError, OSError) as err:
        raise ModelError(f"GGUF file {str(file)!r} cannot be read: {err}") from err


def _split(file: Path) -> str:
    first = _PART_NAME.sub(lambda name: f"-00001{name[0][6:]}", file.name)
    return (
        f"GGUF file {str(file)!r} is split; merge it first: "
        f"`llama-gguf-split --merge {first} merged.gguf`, and give the merged file"
    )


class _SplitError(Exception):
    """The file is one part of several."""


class _Header:
    """Reads one header from its first byte to its last."""

    def __init__(self, stream: BinaryIO, file_bytes: int) -> None:
        self._stream = stream
        self._file_bytes = file_bytes
        self._bytes_left = min(file_bytes, MAX_HEADER_BYTES)
        self._items_left = _MAX_ITEMS

    def check(self) -> int:
        """Return the number of tensors."""
        magic = self._take(4)
        if magic != _MAGIC:
            raise ValueError(f"it begins with {magic!r}, not with {_MAGIC!r}")
        version = self._integer("<I")
        tensors, pairs = self._integer("<Q"), self._integer("<Q")
        if version not in _VERSIONS:
            raise ValueError(f"it has version {version}; versions 2 and 3 are read")
        if tensors > MAX_TENSORS or pairs > _MAX_PAIRS:
            raise ValueError(
                f"it should hold {tensors} tensors and {pairs} values, at most {MAX_TENSORS} and "
                f"{_MAX_PAIRS} are read"
            )
        numbers = self._read_values(pairs)
        if numbers.get(_PARTS, 0) > 1:
            raise _SplitError
        if not tensors:
            raise ValueError("it holds 0 tensors")
        for name, value in numbers.items():
            if name.endswith(_LAYERS) and value > tensors:
                raise ValueError(f"{name} is {value}, more than its {tensors} tensors")
        alignment = numbers.get(_ALIGNMENT, _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment % 8 or not 0 < alignment <= _MAX_ALIGNMENT:
            raise ValueError(
                f"{_ALIGNMENT} is {alignment}, which is no multiple of 8 up to {_MAX_ALIGNMENT}"
            )
        names: set[str] = set()
        self._check_data(sorted(self._tensor(names) for _ in range(tensors)), alignment)
        return tensors

    def _read_values(self, pairs: int) -> dict[str, float]:
        """Read all values by name, and return those that are one number."""
        names: set[str] = set()
        numbers: dict[str, float] = {}
        for _ in range(pairs):
            name = self._new_name(names)
            value = self._value(self._integer("<I"))
            if value is not None:
                numbers[name] = value
        return numbers

    def _check_data(self, ranges: list[tuple[int, int, str]], alignment: int) -> None:
        """Refuse tensors that overlap, are not aligned, or lie beyond the end of the file."""
        position = self._stream.tell()
        start = -(-position // alignment) * alignment
        end = 0
        for offset, size, name in ranges:
            if offset % alignment or offset < end or start + offset + size > self._file_bytes:
                raise ValueError(
                    f"tensor {abbreviated(name)} should lie in {size} bytes at {offset}, which are "
                    "not there or not its own"
                )
            end = offset + size

    def _tensor(self, names: set[str]) -> tuple[int, int, str]:
        """Return the offset of the next tensor's data, their number of bytes, and its name."""
        name = self._new_name(names)
        count = self._integer("<I")
        if not 0 < count <= _MAX_DIMENSIONS:
            raise ValueError(f"tensor {abbreviated(name)} has {count} dimensions")
        shape = [self._integer("<Q") for _ in range(count)]
        kind, offset = self._integer("<I"), self._integer("<Q")
        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError) as err:
            raise ValueError(f"tensor {abbreviated(name)} has the unknown type {kind}") from err
        if not 0 < prod(shape) <= _MAX_NUMBER or shape[0] % block:
            raise ValueError(f"tensor {abbreviated(name)} has the impossible shape {shape}")
        return offset, prod(shape) // block * block_bytes, name

    def _new_name(self, names: set[str]) -> str:
        length = self._integer("<Q")
        if length > _MAX_NAME_BYTES:
            raise ValueError(f"a name in it should have {length} bytes")
        name = self._take(length).decode()
        if name in names:
            raise ValueError(f"it names {abbreviated(name)} twice")
        names.add(name)
        return name

    def _value(self, kind: int) -> float | None:
        """Read a value, and return it if it is one number."""
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind == _STRING:
            self._skip(self._integer("<Q"))
        elif kind == _ARRAY:
            self._skip_array()
        else:
            raise ValueError(f"it holds a value of the unknown type {kind}")
        return None

    def _skip_array(self) -> None:
        kind, count = self._integer("<I"), self._integer("<Q")
        self._items_left -= count
        if self._items_left < 0:
            raise ValueError(f"it should hold a list of {count} items, more than are read")
        if kind in _NUMBERS:
            self._skip(count * struct.calcsize(_NUMBERS[kind]))
        elif kind == _STRING:
            for _ in range(count):
                self._skip(self._integer("<Q"))
        else:
            raise ValueError(f"it holds a list of the unknown type {kind}")

    def _number(self, layout: str) -> float:
        number: float = struct.unpack(layout, self._take(struct.calcsize(layout)))[0]
        return number

    def _integer(self, layout: str) -> int:
        return int(self._number(layout))

    def _take(self, count: int) -> bytes:
        self._count_bytes(count)
        data = self._stream.read(count)
        if len(data) != count:
            raise ValueError("it ends within its header")
        return data

    def _skip(self, count: int) -> None:
        self._count_bytes(count)
        self._stream.seek(count, 1)

    def _count_bytes(self, count: int) -> None:
        self._bytes_left -= count
        if self._bytes_left < 0:
            raise ValueError(f"its header goes beyond its end, or beyond {MAX_HEADER_BYTES} bytes")
