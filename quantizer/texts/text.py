"""Text for calibration and evaluation, and where it comes from. Plain Python, no torch."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from quantizer.errors import TextError

BUILT_IN_CALIBRATION = "builtin:calibration"
BUILT_IN_EVALUATION = "builtin:evaluation"

_RECORD_SUFFIXES = (".jsonl", ".ndjson")
_FILE_SUFFIXES = (*_RECORD_SUFFIXES, ".json", ".md", ".txt")
"""Names that end so are those of files: a dataset is not looked for."""
_DATASET = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclass(frozen=True, slots=True)
class TextSpec:
    """Which windows of which text.

    Attributes:
        source: a text file, a JSONL file with a field `text`, a Hugging Face dataset id as
            `ID[:CONFIG[:SPLIT]]`, or one of the built-in texts.
        windows: number of windows; 0 means all.
        tokens: number of tokens in a window.
        seed: seed by which windows are drawn, if not all are taken. They do not overlap, and are in
            the order of the text. None takes the first ones.
        skip: number of windows that are drawn first and left out, so that two specifications can
            take disjoint windows of one text.
    """

    source: str
    windows: int
    tokens: int
    seed: int | None
    skip: int = 0


def read_text(source: str) -> str:
    """Return the text that `source` names, see `TextSpec.source`.

    Raises:
        TextError: the text is missing, empty, or unreadable, or a record has no field `text`.
    """
    if source in (BUILT_IN_CALIBRATION, BUILT_IN_EVALUATION):
        text = _built_in(source)
    elif _exists(source) and Path(source).is_file():
        text = _file_text(Path(source))
    elif _exists(source):
        raise TextError(
            f"text {source!r} is a folder; give a text file, a JSONL file, or a Hugging Face "
            "dataset id"
        )
    else:
        text = _dataset_text(source)
    if not text.strip():
        raise TextError(f"text {source!r} is empty")
    try:
        text.encode()
    except UnicodeEncodeError as err:
        raise TextError(f"text {source!r} cannot be written as UTF-8: {err}") from err
    return text


def is_at_hand(source: str) -> bool:
    """Return whether a text is built in or on this machine, and not a dataset of the hub."""
    return source in (BUILT_IN_CALIBRATION, BUILT_IN_EVALUATION) or _exists(source)


def _exists(source: str) -> bool:
    try:
        return Path(source).exists()
    except OSError:
        return False  # no file system could hold such a name


def text_sha256(text: str) -> str:
    """Return the hexadecimal SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def _built_in(source: str) -> str:
    """Return one of two disjoint halves of CPython's reference documentation, by alternate topics.

    It stands in where the user gives no text.
    """
    try:
        from pydoc_data.topics import topics  # noqa: PLC0415  some distributions leave it out
    except ImportError as err:
        raise TextError(
            f"text {source!r} needs Python's pydoc_data, which this Python lacks; give a text file"
        ) from err
    names = sorted(topics)
    calibration = [part for name in names[::2] for part in _paragraphs(topics[name])]
    if source == BUILT_IN_CALIBRATION:
        return "\n\n".join(calibration)
    known = set(calibration)  # topics quote each other
    return "\n\n".join(
        part for name in names[1::2] for part in _paragraphs(topics[name]) if part not in known
    )


def _paragraphs(text: str) -> list[str]:
    return re.split(r"\n{2,}", text.strip("\n"))


def _file_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as err:
        raise TextError(f"text {str(path)!r} is not UTF-8: {err}") from err
    except OSError as err:
        raise TextError(f"text {str(path)!r} cannot be read: {err}") from err
    if path.suffix not in _RECORD_SUFFIXES:
        return text
    return "\n\n".join(
        _record_text(line, path, number)
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    )


def _record_text(line: str, path: Path, number: int) -> str:
    try:
        record = json.loads(line)
    except ValueError as err:
        raise TextError(f"text {str(path)!r}, line {number}: not JSON: {err}") from err
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise TextError(f"text {str(path)!r}, line {number}: no field 'text' that holds a string")
    return text


def _dataset_text(source: str) -> str:
    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    is_id = _DATASET.fullmatch(name) and not source.endswith(_FILE_SUFFIXES)
    if not is_id and not _exists(name):  # a folder may hold a dataset
        raise TextError(f"text {source!r} is no file, and no id of a Hugging Face dataset")
    try:
        from datasets import load_dataset  # noqa: PLC0415  optional: bitwright[hub]
    except ImportError as err:
        raise TextError(
            f"text {source!r} is no file; to read it as a Hugging Face dataset, install "
            "bitwright[hub]"
        ) from err
    try:
        data = load_dataset(name, config or None, split=split or "train")
    except Exception as err:
        raise TextError(
            f"text {source!r} is no file, and no Hugging Face dataset that can be read: {err}"
        ) from err
    if "text" not in data.column_names:
        raise TextError(
            f"dataset {source!r} has columns {data.column_names}; one called 'text' is needed"
        )
    return "\n\n".join(str(text) for text in data["text"])
