"""Files that belong to a model but decide nothing that it computes: tokenizer, templates, defaults.

They are copied into a checkpoint as they are in the model's folder. No result of a computation
depends on them, but for windows of text, which depend on `tokenizer_sha256`. Text that is made by a
chat template depends on the template, too. Plain Python.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from quantizer.durable import file_sha256
from quantizer.errors import ModelError
from quantizer.models.config import CONFIG
from quantizer.models.files import CONFIG_BYTES, file_inside, read_object

TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
SIDE_FILE_BYTES = 64_000_000
"""Limit of a side file."""
VOCABULARIES = (
    "tokenizer*",
    "vocab*",
    "merges*",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "added_tokens.json",
    "special_tokens_map.json",
)
"""Files that decide which tokens a text has."""
_TEMPLATE_FOLDER = "additional_chat_templates"
_TEMPLATES = ("*.jinja", "chat_template.json", f"{_TEMPLATE_FOLDER}/*.jinja")
SIDE_FILES = (
    *VOCABULARIES,
    *_TEMPLATES,
    GENERATION_CONFIG,
    "*processor_config.json",
    "audio_tokenizer_config.json",
)
"""All side files; of these patterns, only files of the usual suffixes count."""
_TEMPLATE = "chat_template"
_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".bpe", ".vocab")
_VERSION = re.compile(r"\.v\d+")
"""Mistral's tokenizers are called `tokenizer.model.v3`."""
_PLAIN_NAME = re.compile(r"[A-Za-z0-9._+@=~-]+(/[A-Za-z0-9._+@=~-]+)?")

log = logging.getLogger("bitwright")


def find_side_files(folder: Path) -> tuple[str, ...]:
    """Return the side files of a model folder, as sorted paths relative to it.

    Files with other characters in their name than letters, digits and `._+@=~-` are left out, with
    a warning: no library looks for them.

    Raises:
        ModelError: one is not an ordinary file inside the folder.
    """
    return tuple(sorted(_found(folder, SIDE_FILES)))


def is_side_file(name: str) -> bool:
    """Return whether a path relative to a model folder is that of a side file."""
    return _PLAIN_NAME.fullmatch(name) is not None and _is_named(name, SIDE_FILES)


def copy_side_files(source: Path, target: Path) -> tuple[str, ...]:
    """Copy the side files of a model folder into another folder, over those that are there.

    Returns:
        Their paths relative to the folder, sorted.

    Raises:
        ModelError: see `find_side_files`.
        OSError: the disk is full or fails.
    """
    names = find_side_files(source)
    for name in names:
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)
    return names


def remove_side_files(folder: Path) -> None:
    """Remove the side files of a model folder, and the folders of templates."""
    for name in find_side_files(folder):
        (folder / name).unlink()
    if (folder / _TEMPLATE_FOLDER).is_dir():
        (folder / _TEMPLATE_FOLDER).rmdir()


def side_file_digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each side file of a model folder.

    Raises:
        ModelError: see `find_side_files`, or one cannot be read.
    """
    return {name: _sha256(folder / name) for name in find_side_files(folder)}


def tokenizer_sha256(folder: Path) -> str:
    """Return a digest of everything that decides which tokens a text has, and that they fit.

    The configuration of the model does, as it names the tokenizer, and the rows and positions.

    A chat template does not, also where it stands in the configuration of the tokenizer.

    Raises:
        ModelError: a file cannot be read.
    """
    rows = [f"{CONFIG}:{_sha256(folder / CONFIG)}"]
    for name in sorted(_found(folder, VOCABULARIES)):
        digest = _config_sha256(folder) if name == TOKENIZER_CONFIG else _sha256(folder / name)
        rows.append(f"{name}:{digest}")
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def _found(folder: Path, patterns: tuple[str, ...]) -> Iterator[str]:
    """Yield the files that match a pattern, each once."""
    for path in (*folder.iterdir(), *folder.glob(f"{_TEMPLATE_FOLDER}/*")):
        name = path.relative_to(folder).as_posix()
        if not _is_named(name, patterns) or (path.is_dir() and not path.is_symlink()):
            continue
        if not _PLAIN_NAME.fullmatch(name):
            log.warning("%s is left out: its name has unusual characters", path)
            continue
        file_inside(folder, name)
        yield name


def _is_named(name: str, patterns: tuple[str, ...]) -> bool:
    """Return whether a pattern of the same depth fits a name, whose suffix is one of data."""
    suffix = Path(name).suffix
    return (suffix in _SUFFIXES or _VERSION.fullmatch(suffix) is not None) and any(
        fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns
    )


def _config_sha256(folder: Path) -> str:
    values = read_object(folder / TOKENIZER_CONFIG, CONFIG_BYTES)
    values.pop(_TEMPLATE, None)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _sha256(file: Path) -> str:
    try:
        return file_sha256(file)
    except OSError as err:
        raise ModelError(f"{str(file)!r} cannot be read: {err}") from err
