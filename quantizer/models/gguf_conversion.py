"""GGUF files as ordinary model folders."""

import copy
import hashlib
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from quantizer.durable import atomic_folder, file_sha256
from quantizer.models.loading import (
    LOCAL_ONLY,
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

    Args:
        file: a GGUF file that `quantizer.models.gguf_header.check_gguf` accepted.
        cache: parent folder of converted models.

    Raises:
        ModelError: transformers cannot read the file.
    """
    folder = cache / f"gguf-{file_sha256(file)[:24]}"
    if folder.is_dir():
        return folder
    log.info("converting %s to a model folder, once", file)
    with atomic_folder(folder) as temporary:
        model, tokenizer = _read(file)
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return folder


def convert_gguf_config(file: Path, cache: Path) -> Path:
    """Return a folder with the configuration of a checked GGUF file, and no weights.

    Raises:
        ModelError: transformers cannot read the file.
    """
    with library_errors_as_model_error(_fault(file)), _isolated(file) as isolated:
        config = transformers.AutoConfig.from_pretrained(isolated, gguf_file=_NAME, **LOCAL_ONLY)
    folder = cache / f"outline-{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:24]}"
    config.save_pretrained(folder)
    return folder


def _read(file: Path) -> tuple[Any, Any]:
    """Return model and tokenizer of a GGUF file."""
    with library_errors_as_model_error(_fault(file)), _isolated(file) as isolated:
        options: dict[str, Any] = {"gguf_file": _NAME, **LOCAL_ONLY}
        check_weight_count(
            str(file),
            transformers.AutoConfig.from_pretrained(isolated, **options),
            _SMALLEST_WEIGHTS_PER_BYTE * file.stat().st_size,
        )
        read, info = transformers.AutoModelForCausalLM.from_pretrained(
            isolated, dtype=torch.float32, output_loading_info=True, **options
        )
        check_complete(str(file), info)
        # would be written into tokenizer_config.json, and so change the digest of the folder
        del options["local_files_only"]
        tokenizer = transformers.AutoTokenizer.from_pretrained(isolated, **options)
    return _unquantized(read), tokenizer


def _unquantized(read: Any) -> Any:
    """Return a model of the same weights that does not know that it comes from a GGUF file."""
    config = copy.deepcopy(read.config)
    del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict())
    if all(bool(torch.isfinite(tensor.half()).all()) for tensor in model.state_dict().values()):
        model.half()
    return model


@contextmanager
def _isolated(file: Path) -> Iterator[Path]:
    """Give a folder that holds a link to the file and nothing else, so nothing else is read."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / _NAME).symlink_to(file.resolve())
        yield Path(folder)


def _fault(file: Path) -> str:
    return f"GGUF file {str(file)!r} cannot be read"
