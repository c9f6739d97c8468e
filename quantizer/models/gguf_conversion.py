"""GGUF files as ordinary model folders."""

import copy
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock

from quantizer.durable import atomic_folder, file_sha256, system_errors
from quantizer.errors import ModelError
from quantizer.models.gguf_header import header_sha256
from quantizer.models.loading import (
    LOCAL_ONLY,
    build_bare,
    check_complete,
    check_weight_count,
    library_errors_as_model_error,
)

GGUF_DTYPE = "float16"
"""The dtype of converted weights: a GGUF file names none, and 16 bits hold its block scales."""

_NAME = "model.gguf"
_SMALLEST_WEIGHTS_PER_BYTE = 8
"""A weight takes at least one bit in any GGUF format."""

log = logging.getLogger("bitwright")


def convert_gguf(file: Path, cache: Path) -> Path:
    """Return an ordinary model folder made from a checked GGUF file, once for each file content.

    The weights are stored in float16, or in float32 where one is outside the range of float16.
    Of several processes that ask for one file at once, one converts it and the others wait. The
    folder is complete or absent, also when the disk is full.

    Args:
        file: a GGUF file that `quantizer.models.gguf_header.check_gguf` accepted.
        cache: parent folder of converted models.

    Raises:
        ModelError: transformers cannot read the file.
        OSError: the disk is full or fails.
    """
    folder = cache / f"gguf-{_digest(file)[:24]}"
    with _only_one_makes(folder):
        if not folder.is_dir():
            log.info("converting %s to a model folder, once", file)
            model, tokenizer = _read(file)
            with system_errors(folder), atomic_folder(folder) as temporary:
                model.save_pretrained(temporary)
                tokenizer.save_pretrained(temporary)
    return folder


def convert_gguf_config(file: Path, cache: Path) -> Path:
    """Return a folder with configuration and tokenizer of a checked GGUF file, and no weights.

    The tokenizer is left out where it cannot be read; who needs it finds it missing.

    Raises:
        ModelError: transformers cannot read the file.
        OSError: the disk is full or fails.
    """
    folder = cache / f"outline-{header_sha256(file)[:24]}"
    with _only_one_makes(folder):
        if not folder.is_dir():
            with _isolated(file) as isolated:
                saved = list(_outline(file, isolated))
            with system_errors(folder), atomic_folder(folder) as temporary:
                for each in saved:
                    each.save_pretrained(temporary)
    return folder


def _outline(file: Path, isolated: Path) -> Iterator[Any]:
    """Yield the configuration of a GGUF file, and its tokenizer if it can be read."""
    with library_errors_as_model_error(_fault(file)):
        yield transformers.AutoConfig.from_pretrained(isolated, gguf_file=_NAME, **LOCAL_ONLY)
    with suppress(ModelError), library_errors_as_model_error(_fault(file)):
        yield _read_tokenizer(isolated)


def _read(file: Path) -> tuple[Any, Any]:
    """Return model and tokenizer of a GGUF file."""
    with _isolated(file) as isolated, library_errors_as_model_error(_fault(file)):
        options: dict[str, Any] = {"gguf_file": _NAME, **LOCAL_ONLY}
        check_weight_count(
            str(file),
            build_bare(transformers.AutoConfig.from_pretrained(isolated, **options)),
            _SMALLEST_WEIGHTS_PER_BYTE * file.stat().st_size,
        )
        read, info = transformers.AutoModelForCausalLM.from_pretrained(
            isolated, dtype=torch.float32, output_loading_info=True, **options
        )
        check_complete(str(file), info)
        tokenizer = _read_tokenizer(isolated)
    return _unquantized(read), tokenizer


def _read_tokenizer(isolated: Path) -> Any:
    # local_files_only would be written into tokenizer_config.json, and so change its digest
    return transformers.AutoTokenizer.from_pretrained(
        isolated, gguf_file=_NAME, trust_remote_code=False
    )


def _unquantized(read: Any) -> Any:
    """Return a model of the same weights that does not know that it comes from a GGUF file."""
    config = copy.deepcopy(read.config)
    del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict())
    if all(bool(torch.isfinite(tensor.half()).all()) for tensor in model.state_dict().values()):
        model.half()
    return model


def _digest(file: Path) -> str:
    try:
        return file_sha256(file)
    except OSError as err:
        raise ModelError(f"{_fault(file)}: {err}") from err


@contextmanager
def _only_one_makes(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder in the cache, the one that its removal from the cache takes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        yield


@contextmanager
def _isolated(file: Path) -> Iterator[Path]:
    """Give a folder that holds a link to the file and nothing else, so nothing else is read."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / _NAME).symlink_to(file.resolve())
        yield Path(folder)


def _fault(file: Path) -> str:
    return f"GGUF file {str(file)!r} cannot be read"
