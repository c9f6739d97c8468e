"""Files of a model folder from an untrusted source: inside the folder, of bounded size, sound JSON.

A check reads no more of a file than its limit, and reports every fault as one `ModelError`.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quantizer.errors import ModelError

CONFIG_BYTES = 10_000_000
"""Limit of a configuration file."""
CONFIG_BRACKETS = 100_000
"""Limit of objects and lists in one JSON file.

Each takes two characters in the file, but some 60 bytes in memory.
"""
_DEPTH_LIMIT = 32
_SHOWN_CHARACTERS = 80


def file_inside(folder: Path, name: str) -> Path:
    """Return the path of the file `name`, which must be an ordinary file inside `folder`.

    Links may lead to another place inside the folder and, from a snapshot in the cache of Hugging
    Face, to the blobs beside it.

    Raises:
        ModelError: the file is missing, is not an ordinary file, or lies outside the folder.
    """
    path = folder / name
    try:
        real = path.resolve(strict=True)
        base = folder.resolve(strict=True)
        ordinary = real.is_file()
    except (OSError, RuntimeError, ValueError) as err:
        raise ModelError(f"folder {str(folder)!r} lacks {abbreviated(name)}") from err
    blobs = base.parent.parent / "blobs" if base.parent.name == "snapshots" else base
    if not real.is_relative_to(base) and real.parent != blobs:
        raise ModelError(
            f"{str(path)!r} leads out of its folder, to {str(real)!r}; put the file itself into "
            "the folder"
        )
    if not ordinary:
        raise ModelError(f"{str(path)!r} is no ordinary file")
    return path


def read_object(file: Path, limit_bytes: int) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        file: path of a file that `file_inside` accepted.
        limit_bytes: largest size of the file.

    Raises:
        ModelError: the file is larger than the limit, is not JSON, does not hold an object, holds
            more than `CONFIG_BRACKETS` objects and lists, or is nested too deeply.
    """
    data = read_bounded(file, limit_bytes)
    check_bracket_count(file, data, CONFIG_BRACKETS)
    try:
        values = json.loads(data.decode())
    except RecursionError as err:
        raise ModelError(f"{str(file)!r} cannot be read: it is nested too deeply") from err
    except ValueError as err:
        raise ModelError(f"{str(file)!r} cannot be read: {err}") from err
    if not isinstance(values, dict):
        raise ModelError(f"{str(file)!r} is not a JSON object")
    if any(depth > _DEPTH_LIMIT for depth, _, _ in nested_values(values)):
        raise ModelError(
            f"{str(file)!r} cannot be read: it is nested more than {_DEPTH_LIMIT} levels deep"
        )
    return values


def read_bounded(file: Path, limit_bytes: int) -> bytes:
    """Return the content of a file of at most `limit_bytes`.

    Raises:
        ModelError: the file is larger, or cannot be read.
    """
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > limit_bytes:
                raise ModelError(
                    f"{str(file)!r} is larger than {limit_bytes} bytes, more than such a file needs"
                )
            return stream.read(size)
    except OSError as err:
        raise ModelError(f"{str(file)!r} cannot be read: {err}") from err


def check_bracket_count(file: Path, data: bytes, limit: int) -> None:
    """Refuse JSON text with more than `limit` opening brackets, which bounds what a parser builds.

    Raises:
        ModelError: there are more.
    """
    if data.count(b"[") + data.count(b"{") > limit:
        raise ModelError(
            f"{str(file)!r} holds more than {limit} objects and lists, more than such a file needs"
        )


def nested_values(values: Mapping[str, Any]) -> Iterator[tuple[int, str, Any]]:
    """Yield (depth, key, value) of everything in nested objects and lists.

    The depth starts at 1. The key is empty for objects and lists inside a list; other items of
    lists are not yielded.
    """
    waiting: list[tuple[int, str, Any]] = [(1, key, value) for key, value in values.items()]
    while waiting:
        depth, key, value = waiting.pop()
        yield depth, key, value
        if isinstance(value, dict):
            waiting.extend((depth + 1, inner, each) for inner, each in value.items())
        elif isinstance(value, list):
            waiting.extend((depth + 1, "", each) for each in value if isinstance(each, dict | list))


def abbreviated(value: object) -> str:
    """Return `repr(value)` cut to 80 characters, for messages about values of any size."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
