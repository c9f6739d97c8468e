"""From what a user calls a model to a local folder that was checked.

Nothing that a model brings is ever executed: weights are read from safetensors and GGUF files only,
and models that need code of their own are refused. The modules of this room check every file before
a library reads it.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers

from quantizer.durable import file_sha256
from quantizer.errors import ModelError
from quantizer.models.config import CONFIG, check_layer_count, read_config
from quantizer.models.files import abbreviated
from quantizer.models.folder import ModelFolder, check_folder
from quantizer.models.gguf_conversion import GGUF_DTYPE, convert_gguf, convert_gguf_config
from quantizer.models.gguf_header import check_gguf
from quantizer.models.hub import HubModel, Outline, download, find_snapshot, outline
from quantizer.models.safetensors_header import check_safetensors
from quantizer.models.side_files import tokenizer_sha256
from quantizer.models.stored_weights import read_stored
from quantizer.models.weight_files import (
    check_tensors,
    find_weight_files,
    incomplete,
    unfinished_downloads,
)

_QUANT_METHOD = "bitwright"
_DIGESTED_EARLIER = (
    CONFIG,
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
"""Files beside the weights in the digest that the first versions recorded."""


def find_model(reference: str, cache: Path, *, read_weights: bool = True) -> ModelFolder:
    """Return the folder of the model that `reference` names, after checking it.

    Args:
        reference: a folder, a GGUF file, or a Hugging Face model id, `ORG/NAME[@REVISION]`. The
            folder may also be one of the hub's cache.
        cache: parent folder of models that are converted from GGUF.
        read_weights: whether to check every value and to take the digest. If not, only headers are
            read, a GGUF file gives a folder with its configuration and tokenizer, a model of the
            hub one without the weights that are not there yet, and the digest is empty.

    Raises:
        ModelError: the model is unknown, has no safetensors weights, is truncated or not finite,
            needs code of its own, is quantized already, or is not a decoder-only language model; or
            its files contradict themselves, or lead out of the folder.
        OSError: the disk is full while a model is downloaded or a GGUF file converted.
    """
    path = _local(reference)
    if path is not None and path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(
                f"model {reference!r} is a file; give a folder, a .gguf file, or a Hugging Face id"
            )
        check_gguf(path)
        if not read_weights:
            return ModelFolder(convert_gguf_config(path, cache), reference, "", GGUF_DTYPE)
        return _checked(convert_gguf(path, cache), reference, read_weights=True)
    if path is not None:
        return _checked(find_snapshot(path), reference, read_weights=read_weights)
    model = HubModel.parse(reference)
    if model is None:
        raise ModelError(
            f"model {reference!r}: no such folder or file, and not a Hugging Face model id"
        )
    if read_weights:
        return _checked(download(model), reference, read_weights=True)
    return _outlined(outline(model), reference)


def check_checkpoint(folder: Path) -> None:
    """Refuse a folder that cannot be a checkpoint of this package, before transformers loads it.

    Raises:
        ModelError: its files contradict themselves, lead out of the folder, or are not safetensors
            files; or another method has quantized it.
    """
    check_folder(folder)
    read_config(folder, quant_method=_QUANT_METHOD)
    for file in find_weight_files(folder):
        check_safetensors(file)


def _checked(folder: Path, name: str, *, read_weights: bool) -> ModelFolder:
    config = _read_checked_config(folder)
    weights = find_weight_files(folder)
    stored = read_stored(folder, weights)
    check_layer_count(folder / CONFIG, config, len(stored.tensors))
    for file in weights:
        check_tensors(file, read_values=read_weights)
    if not read_weights:
        return ModelFolder(folder, name, "", stored.dtype, stored)
    sums = _file_digests(folder, weights)
    computing = {file: sums[file] for file in (CONFIG, *(path.name for path in weights))}
    tokens = tokenizer_sha256(folder)
    return ModelFolder(
        folder, name, _digest(computing), stored.dtype, stored, tokens, _digest(sums)
    )


def _outlined(seen: Outline, name: str) -> ModelFolder:
    """Return a model of the hub, whose weights need not be on this machine."""
    if seen.stored is None:
        return _checked(seen.folder, name, read_weights=False)
    config = _read_checked_config(seen.folder)
    check_layer_count(seen.folder / CONFIG, config, len(seen.stored.tensors))
    dtype = seen.stored.dtype
    return ModelFolder(
        seen.folder, name, "", dtype, seen.stored, download_bytes=seen.download_bytes
    )


def _read_checked_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of a folder, after checking it and the files beside the weights."""
    check_folder(folder)
    if not (folder / CONFIG).exists() and unfinished_downloads(folder):
        raise incomplete(folder, CONFIG)
    config = read_config(folder)
    _check_model_type(folder, config)
    return config


def _check_model_type(folder: Path, config: dict[str, Any]) -> None:
    """Refuse a model type that transformers does not know as a decoder-only language model."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        if config.get("auto_map"):
            raise ModelError(
                f"model in {str(folder)!r} needs code of its own (auto_map, model_type "
                f"{abbreviated(kind)}); such code is never run. "
                "Convert the model to a type that transformers knows"
            )
        raise ModelError(
            f"model in {str(folder)!r} has model_type {abbreviated(kind)}, unknown to the "
            "installed transformers"
        )
    auto = transformers.models.auto.modeling_auto
    known = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    if kind not in known:
        raise ModelError(
            f"model in {str(folder)!r} has model_type {kind!r}, which is no decoder-only language "
            "model"
        )


def _local(reference: str) -> Path | None:
    """Return the file or folder of this name, or None if there is none."""
    try:
        path = Path(reference).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError):
        return None  # no file system could hold such a name, or no user has it


def _file_digests(folder: Path, weights: list[Path]) -> dict[str, str]:
    """Return the SHA-256 of configuration, tokenizer and weights, by name of the file."""
    files = [folder / name for name in _DIGESTED_EARLIER if (folder / name).is_file()]
    try:
        return {file.name: file_sha256(file) for file in [*files, *weights]}
    except OSError as err:
        raise ModelError(f"folder {str(folder)!r} cannot be read: {err}") from err


def _digest(sums: Mapping[str, str]) -> str:
    rows = [f"{name}:{digest}" for name, digest in sums.items()]
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()
