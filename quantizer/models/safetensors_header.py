"""The header of a safetensors file, checked against the file before any library reads it.

Format: https://github.com/huggingface/safetensors#format: 8 bytes with the length of the header, a
JSON object with dtype, shape and byte range of each tensor, then the data. The library checks the
same when it opens a file (tried with safetensors 0.8), but it accepts unknown fields of a tensor,
its messages repeat kilobytes of the file and do not always name the tensor, and it parses the
whole header at once, which takes 13 times the header's size in memory and seconds for each 10 MB.
This module parses one entry at a time.
"""

import codecs
import json
import re
import sys
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from quantizer.errors import ModelError
from quantizer.models.files import abbreviated

MAX_HEADER_BYTES = 100_000_000
"""As the library has it."""
MAX_TENSORS = 1_000_000
_MAX_ENTRY_BYTES = 4096
_MAX_DIMENSIONS = 8
_MAX_NUMBER = 2**63 - 1
_DECODED_BYTES = 1 << 20

_DTYPE_BITS = {
    **dict.fromkeys(
        ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8
    ),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
_SPACE = rb"[ \t\n\r]*+"
_STRING = rb'"(?:[^"\\\x00-\x1f]++|\\.)*+"'
_PAIR = _STRING + _SPACE + b":" + _SPACE + _STRING + _SPACE
_NAME = re.compile(_SPACE + b"(" + _STRING + b")" + _SPACE + b":" + _SPACE)
_ENTRY = re.compile(rb"(\{[^{}]*+\})" + _SPACE + b"([,}])")
_EMPTY = re.compile(rb"\{" + _SPACE + rb"\}")
_METADATA = re.compile(
    rb"(\{" + _SPACE + b"(?:" + _PAIR + b"(?:," + _SPACE + _PAIR + rb")*+)?\})" + _SPACE + b"([,}])"
)


class StoredTensor(NamedTuple):
    """A tensor as the header of a file describes it.

    Attributes:
        start: offset of its data, behind the header.
        stop: end of its data.
        name: its name.
        dtype: as the format calls it, such as `BF16`.
        weights: number of its elements.
    """

    start: int
    stop: int
    name: str
    dtype: str
    weights: int

    @property
    def size_bytes(self) -> int:
        """Bytes of its data."""
        return self.stop - self.start


def check_safetensors(file: Path) -> int:
    """Return the number of tensors in a safetensors file, after checking its header.

    See `read_tensors`.
    """
    return len(read_tensors(file))


def read_tensors(file: Path) -> list[StoredTensor]:
    """Return the tensors of a safetensors file by their offsets, after checking its header.

    Only the header is read. The tensors must cover the rest of the file exactly, without gaps and
    overlaps.

    Raises:
        ModelError: saying what is wrong.
    """
    try:
        with file.open("rb") as stream:
            return parse_tensors(str(file), stream, file.stat().st_size)
    except OSError as err:
        raise ModelError(f"weights {str(file)!r} are damaged or truncated: {err}") from err


def parse_tensors(name: str, stream: BinaryIO, file_bytes: int) -> list[StoredTensor]:
    """Return the tensors of a safetensors file of which only the beginning may be at hand.

    Args:
        name: of the file, for messages.
        stream: its content from the first byte to the end of the header at least.
        file_bytes: the size of the whole file.

    Raises:
        ModelError: as `read_tensors` does.
    """
    try:
        header, data_bytes = _read_header(stream, file_bytes)
        tensors = sorted(_tensors(header))
        _check_ranges(tensors, data_bytes)
    except RecursionError as err:
        raise ModelError(
            f"weights {name!r} are damaged or truncated: the header is nested too deeply"
        ) from err
    except ValueError as err:
        raise ModelError(f"weights {name!r} are damaged or truncated: {err}") from err
    return tensors


def _read_header(stream: BinaryIO, file_bytes: int) -> tuple[bytes, int]:
    """Return the header, valid UTF-8, and the number of bytes after it."""
    length = int.from_bytes(stream.read(8), "little")
    if not 0 < length <= min(MAX_HEADER_BYTES, file_bytes - 8):
        raise ValueError(
            f"the header should take {length} bytes of {file_bytes}, and at most "
            f"{MAX_HEADER_BYTES} are read"
        )
    header = stream.read(length)
    if len(header) != length:
        raise ValueError(f"the header should take {length} bytes, of which {len(header)} are there")
    if not header.startswith(b"{"):
        raise ValueError("the header is no JSON object")
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, length, _DECODED_BYTES):
        stop = start + _DECODED_BYTES
        decoder.decode(header[start:stop], final=stop >= length)
    return header, file_bytes - 8 - length


def _check_ranges(tensors: list[StoredTensor], data_bytes: int) -> None:
    """Refuse tensors whose sorted byte ranges do not cover the data exactly."""
    end = 0
    for tensor in tensors:
        if tensor.start != end:
            raise ValueError(
                f"the data of tensor {abbreviated(tensor.name)} begin at byte {tensor.start}, "
                f"those before it end at byte {end}"
            )
        end = tensor.stop
    if end != data_bytes:
        raise ValueError(f"the tensors take {end} bytes, the file holds {data_bytes}")


def _tensors(header: bytes) -> Iterator[StoredTensor]:
    """Yield each tensor.

    Nothing larger than one entry is parsed at once.
    """
    names: set[str] = set()
    empty = _EMPTY.match(header)
    position = empty.end() if empty else 1
    more = not empty
    while more:
        name = _NAME.match(header, position)
        metadata = name is not None and name[1] == b'"__metadata__"'
        entry = name and (_METADATA if metadata else _ENTRY).match(header, name.end())
        if (
            name is None
            or entry is None
            or (not metadata and entry.end() - position > _MAX_ENTRY_BYTES)
        ):
            raise ValueError(f"byte {position} of the header begins no entry of a tensor")
        key = json.loads(name[1].decode())
        _add_name(names, key)
        if not metadata:
            yield _tensor(key, _STRICT_JSON.decode(entry[1].decode()))
        position = entry.end()
        more = entry[2] == b","
    if header[position:].strip():
        raise ValueError(f"byte {position} of the header follows its end")


def _add_name(names: set[str], name: str) -> None:
    if name in names:
        raise ValueError(f"the header names {abbreviated(name)} twice")
    if len(names) > MAX_TENSORS:
        raise ValueError(f"more than {MAX_TENSORS} tensors")
    names.add(name)


def _tensor(name: str, entry: Mapping[str, Any]) -> StoredTensor:
    """Return a tensor; the length of its range must follow from its dtype and shape."""
    if set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(
            f"tensor {abbreviated(name)} has not exactly a dtype, a shape and data_offsets"
        )
    dtype, shape = entry["dtype"], entry["shape"]
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        raise ValueError(f"tensor {abbreviated(name)} has the unknown dtype {abbreviated(dtype)}")
    if (
        not _whole_numbers(shape)
        or len(shape) > _MAX_DIMENSIONS
        or prod(filter(None, shape)) > _MAX_NUMBER
    ):
        raise ValueError(
            f"tensor {abbreviated(name)} has the impossible shape {abbreviated(shape)}"
        )
    match entry["data_offsets"]:
        case [int(start), int(stop)] as offsets if (
            _whole_numbers(offsets) and start <= stop <= _MAX_NUMBER
        ):
            size = stop - start
        case offsets:
            raise ValueError(
                f"tensor {abbreviated(name)} has the impossible data_offsets {abbreviated(offsets)}"
            )
    if size * 8 != prod(shape) * _DTYPE_BITS[dtype]:
        raise ValueError(
            f"tensor {abbreviated(name)} has {size} bytes, which are not {dtype} "
            f"{abbreviated(shape)}"
        )
    return StoredTensor(start, stop, name, sys.intern(dtype), prod(shape))


def _whole_numbers(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("the header says something twice")
    return values


def _no_number(text: str) -> Any:
    raise ValueError(f"the header holds {text} for a number")


_STRICT_JSON = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_number)
