"""What a model folder from anywhere may hold.

Everything is checked here before any library reads it.

No weight is read, no memory is taken on the word of a file, and whatever is wrong raises one
ModelError. Plain Python.
"""

import codecs
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from quantizer.errors import ModelError

MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 1_000_000
_MAX_ENTRY_BYTES = 4096
_MAX_DIMENSIONS = 8
_MAX_NUMBER = 2**63 - 1

_MAX_CONFIG_BYTES = 10_000_000
_MAX_INDEX_BYTES = 32_000_000
_MAX_VOCABULARY_BYTES = 64_000_000
_MAX_BRACKETS, _MAX_VOCABULARY_BRACKETS = 100_000, 2_000_000
"""Objects and lists in one JSON file: two characters there, some 60 bytes in memory.

A vocabulary has one for each merge.
"""
_MAX_DEPTH = 32
_SHOWN = 80

_CONFIGS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_VOCABULARIES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "additional_chat_templates/*.jinja",
)
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")

_ATTENTION = ("attn_implementation", "experts_implementation")
_IMPLEMENTATIONS = frozenset(
    [
        *_ATTENTION,
        *(f"_{name}" for name in _ATTENTION),
        *(f"_{name}_internal" for name in _ATTENTION),
    ]
)
_BUILT_IN = re.compile(r"eager|sdpa|flash_attention_\d|flex_attention|batched_mm|grouped_mm")
_REDIRECTIONS = frozenset(["configuration_files", "transformers_weights", "fast_tokenizer_files"])
_QUANTIZATION = "quantization_config"
_QUANTIZED = frozenset([_QUANTIZATION, "compression_config"])
_DROPPED = frozenset(
    [
        *(
            "auto_map",
            "custom_pipelines",
            "trust_remote_code",
            "name_or_path",
            *_ATTENTION,
            "fusion_config",
            "kernel_config",
        ),
        *(
            "use_kernels",
            "device_map",
            "distributed_config",
            "base_model_tp_plan",
            "base_model_pp_plan",
            "base_model_fsdp_plan",
        ),
    ]
)
_PRIVATE_KEYS = frozenset(["_sliding_window_pattern"])
_IGNORED_FILES = frozenset(
    ["special_tokens_map_file", "added_tokens_file", "tokenizer_config_file", "chat_template_file"]
)
_LAYER_COUNTS = frozenset(["num_hidden_layers", "num_layers", "n_layer", "n_layers"])

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
_SPACE, _STRING = rb"[ \t\n\r]*+", rb'"(?:[^"\\\x00-\x1f]++|\\.)*+"'
_PAIR = _STRING + _SPACE + b":" + _SPACE + _STRING + _SPACE
_NAME = re.compile(_SPACE + b"(" + _STRING + b")" + _SPACE + b":" + _SPACE)
_ENTRY = re.compile(rb"(\{[^{}]*+\})" + _SPACE + b"([,}])")
_EMPTY = re.compile(rb"\{" + _SPACE + rb"\}")
_METADATA = re.compile(
    rb"(\{" + _SPACE + b"(?:" + _PAIR + b"(?:," + _SPACE + _PAIR + rb")*+)?\})" + _SPACE + b"([,}])"
)


def check_folder(folder: Path) -> None:
    """Refuse a folder whose configurations or vocabularies are too large, too deep, no plain files, or outside of it.

    Raises:
        ModelError: so it is, or the folder holds what transformers would load beside or instead of
            the weights.
    """
    for path in sorted(folder.iterdir()):
        if _DISTRIBUTED.fullmatch(path.name):
            raise ModelError(
                f"{str(path)!r} is part of a distributed checkpoint; save the model in the "
                "ordinary layout"
            )
        if path.name == "adapter_config.json":
            raise ModelError(
                f"{str(path)!r} says that the folder holds an adapter; merge it into the model "
                "first"
            )
    for name in _CONFIGS:
        if (folder / name).exists():
            values = read_object(file_inside(folder, name), _MAX_CONFIG_BYTES)
            if name == "tokenizer_config.json":
                _check_keys(folder / name, values)
                _check_named_files(folder, values)
    for path in {path for pattern in _VOCABULARIES for path in folder.glob(pattern)}:
        if path.name in _CONFIGS or (path.is_dir() and not path.is_symlink()):
            continue
        data = _read(file_inside(folder, str(path.relative_to(folder))), _MAX_VOCABULARY_BYTES)
        if path.suffix == ".json":
            _check_brackets(path, data, _MAX_VOCABULARY_BRACKETS)


def read_config(folder: Path, quant_method: str | None = None) -> dict[str, Any]:
    """Return `config.json`, which asks for nothing but a model of its type.

    Args:
        folder: of the model.
        quant_method: by which it may be quantized.

    Raises:
        ModelError: it is missing or unreadable, is quantized, or names kernels, other files or an
            address.
    """
    if not (folder / "config.json").exists():
        raise ModelError(
            f"folder {str(folder)!r} has no config.json; give a transformers model folder"
        )
    config = read_object(file_inside(folder, "config.json"), _MAX_CONFIG_BYTES)
    known = quant_method is not None and _quantized_by(config) == quant_method
    _check_keys(
        folder / "config.json",
        {key: value for key, value in config.items() if key != _QUANTIZATION or not known},
    )
    return config


def sanitized(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without what has no say here.

    Code of its own, private fields, and the machine to run on.
    """
    kept = {
        key: value
        for key, value in config.items()
        if key not in _DROPPED and (not key.startswith("_") or key in _PRIVATE_KEYS)
    }
    return {
        key: sanitized(value) if key.endswith("_config") and isinstance(value, dict) else value
        for key, value in kept.items()
    }


def check_layers(file: Path, values: Mapping[str, Any], tensors: int) -> None:
    """Refuse a configuration of more layers than there are tensors.

    Building it could take any time and memory.

    Raises:
        ModelError: naming the count.
    """
    for _, key, value in _walk(values):
        if key in _LAYER_COUNTS and isinstance(value, int | float) and value > tensors:
            raise ModelError(
                f"{str(file)!r} says {key} {abbreviated(value)}, more than the {tensors} tensors that "
                "are stored"
            )


def file_inside(folder: Path, name: str) -> Path:
    """Return the file of this name in a folder, which must be an ordinary file that lies there.

    Links are followed within the folder, and from a snapshot in the cache of Hugging Face to the
    blobs beside it.

    Raises:
        ModelError: it is missing, is no ordinary file, or lies elsewhere.
    """
    path = folder / name
    try:
        real, base = path.resolve(strict=True), folder.resolve(strict=True)
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

    Raises:
        ModelError: it is larger than the limit, no JSON, no object, or nested too deeply.
    """
    data = _read(file, limit_bytes)
    _check_brackets(file, data, _MAX_BRACKETS)
    try:
        values = json.loads(data.decode())
    except RecursionError as err:
        raise ModelError(f"{str(file)!r} cannot be read: it is nested too deeply") from err
    except ValueError as err:
        raise ModelError(f"{str(file)!r} cannot be read: {err}") from err
    if not isinstance(values, dict):
        raise ModelError(f"{str(file)!r} is not a JSON object")
    if any(depth > _MAX_DEPTH for depth, _, _ in _walk(values)):
        raise ModelError(
            f"{str(file)!r} cannot be read: it is nested more than {_MAX_DEPTH} levels deep"
        )
    return values


def read_shards(folder: Path, index: Path) -> list[Path]:
    """Return the weight files that an index names, each once, by name.

    Raises:
        ModelError: it is no index, or names a file that is missing, lies elsewhere, or is no
            safetensors file.
    """
    named = read_object(file_inside(folder, index.name), _MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise ModelError(
            f"{str(index)!r} is not a safetensors index: it has no weight_map with tensors"
        )
    strange = [
        name
        for name in named.values()
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", name)
    ]
    if strange:
        raise ModelError(
            f"{str(index)!r} is not a safetensors index: it names {abbreviated(strange[0])}, no "
            "safetensors file beside it"
        )
    return [file_inside(folder, name) for name in sorted(set(named.values()))]


def check_safetensors(file: Path) -> int:
    """Return the number of tensors that the header of a safetensors file names, after checking all that the header says.

    Only the header is read. Tensors must cover the rest of the file exactly, without gaps and
    overlaps.

    Raises:
        ModelError: with what is wrong.
    """
    try:
        with file.open("rb") as stream:
            header, data_bytes = _read_header(stream, file.stat().st_size)
        return _check_spans(sorted(_spans(header)), data_bytes)
    except RecursionError as err:
        raise ModelError(
            f"weights {str(file)!r} are damaged or truncated: the header is nested too deeply"
        ) from err
    except (ValueError, OSError) as err:
        raise ModelError(f"weights {str(file)!r} are damaged or truncated: {err}") from err


def abbreviated(value: object) -> str:
    """Return how a value of any size is shown in a message."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _read_header(stream: BinaryIO, file_bytes: int) -> tuple[bytes, int]:
    """Return the header and the number of bytes after it."""
    length = int.from_bytes(stream.read(8), "little")
    if not 0 < length <= min(MAX_HEADER_BYTES, file_bytes - 8):
        raise ValueError(
            f"the header should take {length} bytes of {file_bytes}, and at most "
            f"{MAX_HEADER_BYTES} are read"
        )
    header = stream.read(length)
    if not header.startswith(b"{"):
        raise ValueError("the header is no JSON object")
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, length, 1 << 20):
        decoder.decode(header[start : start + (1 << 20)], final=start + (1 << 20) >= length)
    return header, file_bytes - 8 - length


def _check_spans(spans: list[tuple[int, int, str]], data_bytes: int) -> int:
    """Return the number of tensors, whose data must follow each other without gaps and overlaps to the end."""
    end = 0
    for start, stop, name in spans:
        if start != end:
            raise ValueError(
                f"the data of tensor {abbreviated(name)} begin at byte {start}, those before it end at "
                f"byte {end}"
            )
        end = stop
    if end != data_bytes:
        raise ValueError(f"the tensors take {end} bytes, the file holds {data_bytes}")
    return len(spans)


def _spans(header: bytes) -> Iterator[tuple[int, int, str]]:
    """Yield where the data of each tensor begin and end, and its name.

    Nothing larger than one entry is ever parsed.
    """
    names: set[str] = set()
    empty = _EMPTY.match(header)
    position, more = empty.end() if empty else 1, not empty
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
        if key in names or len(names) > MAX_TENSORS:
            raise ValueError(
                f"the header names {abbreviated(key)} twice"
                if key in names
                else f"more than {MAX_TENSORS} tensors"
            )
        names.add(key)
        if not metadata:
            yield *_span(key, _STRICT.decode(entry[1].decode())), key
        position, more = entry.end(), entry[2] == b","
    if header[position:].strip():
        raise ValueError(f"byte {position} of the header follows its end")


def _span(name: str, entry: Mapping[str, Any]) -> tuple[int, int]:
    """Return where the data of a tensor begin and end, which is as long as its dtype and shape say."""
    if set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(
            f"tensor {abbreviated(name)} has not exactly a dtype, a shape and data_offsets"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        raise ValueError(f"tensor {abbreviated(name)} has the unknown dtype {abbreviated(dtype)}")
    if not _whole(shape) or len(shape) > _MAX_DIMENSIONS or prod(filter(None, shape)) > _MAX_NUMBER:
        raise ValueError(
            f"tensor {abbreviated(name)} has the impossible shape {abbreviated(shape)}"
        )
    if not _whole(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= _MAX_NUMBER:  # noqa: PLR2004  a pair
        raise ValueError(
            f"tensor {abbreviated(name)} has the impossible data_offsets {abbreviated(offsets)}"
        )
    if (offsets[1] - offsets[0]) * 8 != prod(shape) * _DTYPE_BITS[dtype]:
        raise ValueError(
            f"tensor {abbreviated(name)} has {offsets[1] - offsets[0]} bytes, which are not {dtype} "
            f"{abbreviated(shape)}"
        )
    return offsets[0], offsets[1]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("the header says something twice")
    return values


def _no_number(text: str) -> Any:
    raise ValueError(f"the header holds {text} for a number")


_STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_number)


def _whole(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _read(file: Path, limit_bytes: int) -> bytes:
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


def _check_brackets(file: Path, data: bytes, limit: int) -> None:
    if data.count(b"[") + data.count(b"{") > limit:
        raise ModelError(
            f"{str(file)!r} holds more than {limit} objects and lists, more than such a file needs"
        )


def _check_keys(file: Path, values: Mapping[str, Any]) -> None:
    """Refuse what would make transformers load something else than the checked files."""
    for _, key, value in _walk(values):
        if key in _QUANTIZED and value:
            raise ModelError(
                f"model in {str(file.parent)!r} is quantized already; give the original"
            )
        if key in _IMPLEMENTATIONS:
            named = list(value.values()) if isinstance(value, dict) else [value]
            if any(
                each is not None and not (isinstance(each, str) and _BUILT_IN.fullmatch(each))
                for each in named
            ):
                raise ModelError(
                    f"{str(file)!r} names code from elsewhere, {key} {abbreviated(value)}, which is "
                    "never run; drop the key"
                )
        if key in _REDIRECTIONS and value:
            raise ModelError(
                f"{str(file)!r} refers to other files by {key}, {abbreviated(value)}; drop the key"
            )
        if key == "_name_or_path" and isinstance(value, str) and "://" in value:
            raise ModelError(
                f"{str(file)!r} names an address in {key}, {abbreviated(value)}; drop the key"
            )


def _quantized_by(config: Mapping[str, Any]) -> object:
    described = config.get(_QUANTIZATION)
    return described.get("quant_method") if isinstance(described, dict) else None


def _check_named_files(folder: Path, values: Mapping[str, Any]) -> None:
    """Refuse vocabularies elsewhere on this machine.

    Paths that are of another machine lead nowhere.
    """
    for key, value in values.items():
        if key.endswith("_file") and key not in _IGNORED_FILES and isinstance(value, str) and value:
            with suppress(OSError, RuntimeError, ValueError):
                path = Path(value).resolve()
                if path.exists() and not path.is_relative_to(folder.resolve()):
                    raise ModelError(
                        f"tokenizer_config.json in {str(folder)!r} names {abbreviated(value)}, outside "
                        f"of it; drop {key}"
                    )


def _walk(values: Mapping[str, Any]) -> Iterator[tuple[int, str, Any]]:
    """Yield all that nested objects and lists hold: depth, key (empty in a list), value."""
    waiting: list[tuple[int, str, Any]] = [(1, key, value) for key, value in values.items()]
    while waiting:
        depth, key, value = waiting.pop()
        yield depth, key, value
        if isinstance(value, dict):
            waiting.extend((depth + 1, inner, each) for inner, each in value.items())
        elif isinstance(value, list):
            waiting.extend((depth + 1, "", each) for each in value if isinstance(each, dict | list))
