"""A model folder, and the files in it beside configuration and weights that must be checked."""

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantizer.errors import ModelError
from quantizer.models.config import CONFIG, check_fields
from quantizer.models.files import (
    CONFIG_BYTES,
    abbreviated,
    check_bracket_count,
    file_inside,
    read_bounded,
    read_object,
)
from quantizer.models.side_files import (
    GENERATION_CONFIG,
    SIDE_FILE_BYTES,
    SIDE_FILES,
    TOKENIZER_CONFIG,
)
from quantizer.models.stored_weights import StoredWeights

_CONFIGS = (
    CONFIG,
    GENERATION_CONFIG,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
)
_VOCABULARY_BRACKETS = 2_000_000
"""A vocabulary has one list for each merge."""
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_IGNORED_PATHS = frozenset(
    ["special_tokens_map_file", "added_tokens_file", "tokenizer_config_file", "chat_template_file"]
)


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A local folder with a transformers model that was checked.

    Attributes:
        path: the folder.
        name: what the user called the model.
        sha256: digest of every file that decides what the model computes from tokens; empty if
            only headers were read.
        dtype: the dtype in which most weights are stored, such as `bfloat16`.
        stored: what the weight files hold; None for a GGUF file of which only the header was read.
        tokenizer_sha256: digest of what decides which tokens a text has; empty as `sha256` is.
        earlier_sha256: the digest that the first versions recorded in profiles; it covered some
            files of the tokenizer, too.
        download_bytes: size of the weights that a run has to download first.
    """

    path: Path
    name: str
    sha256: str
    dtype: str
    stored: StoredWeights | None = field(default=None, repr=False, compare=False)
    tokenizer_sha256: str = ""
    earlier_sha256: str = ""
    download_bytes: int = 0


def check_folder(folder: Path) -> None:
    """Check the configurations and vocabularies of a folder, all but the fields of `config.json`.

    Raises:
        ModelError: a file is too large, nested too deeply, not an ordinary file, or outside the
            folder; or the folder holds an adapter or a distributed checkpoint, which transformers
            would load in addition to the weights or instead of them.
    """
    try:
        _check_folder(folder)
    except OSError as err:
        raise ModelError(f"folder {str(folder)!r} cannot be read: {err}") from err


def _check_folder(folder: Path) -> None:
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
            values = read_object(file_inside(folder, name), CONFIG_BYTES)
            if name == TOKENIZER_CONFIG:
                check_fields(folder / name, values)
                _check_vocabulary_paths(folder, values)
    for path in {path for pattern in SIDE_FILES for path in folder.glob(pattern)}:
        if path.name not in _CONFIGS and (not path.is_dir() or path.is_symlink()):
            _check_vocabulary(folder, path)


def _check_vocabulary(folder: Path, path: Path) -> None:
    data = read_bounded(file_inside(folder, str(path.relative_to(folder))), SIDE_FILE_BYTES)
    if path.suffix == ".json":
        check_bracket_count(path, data, _VOCABULARY_BRACKETS)


def _check_vocabulary_paths(folder: Path, values: Mapping[str, Any]) -> None:
    """Refuse vocabularies elsewhere on this machine.

    A path that does not exist is accepted: it is of the machine on which the model was saved.
    """
    for key, value in values.items():
        if key.endswith("_file") and key not in _IGNORED_PATHS and isinstance(value, str) and value:
            with suppress(OSError, RuntimeError, ValueError):
                path = Path(value).resolve()
                if path.exists() and not path.is_relative_to(folder.resolve()):
                    raise ModelError(
                        f"{TOKENIZER_CONFIG} in {str(folder)!r} names {abbreviated(value)}, "
                        f"outside of it; drop {key}"
                    )
