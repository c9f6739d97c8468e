"""From what a user calls a model to a local folder that was checked.

Nothing that a model brings is ever executed: weights are read from safetensors and GGUF files only,
and models that need code of their own are refused. The modules of this room check every file before
a library reads it.
"""

import hashlib
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import transformers

from quantizer.durable import file_sha256
from quantizer.errors import ModelError
from quantizer.models.config import CONFIG, check_layer_count, read_config
from quantizer.models.files import abbreviated
from quantizer.models.folder import ModelFolder, check_folder
from quantizer.models.gguf_conversion import GGUF_DTYPE, convert_gguf, convert_gguf_config
from quantizer.models.gguf_header import check_gguf
from quantizer.models.safetensors_header import check_safetensors
from quantizer.models.weight_files import check_tensors, find_weight_files, stored_dtype

_DOWNLOADED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
_REPOSITORY = re.compile(r"^\w[\w.-]*(/\w[\w.-]*)?$")
_QUANT_METHOD = "bitwright"
_DIGESTED = (
    CONFIG,
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
"""Files beside the weights that decide what a model computes."""


def find_model(reference: str, cache: Path, *, read_weights: bool = True) -> ModelFolder:
    """Return the folder of the model that `reference` names, after checking it.

    Args:
        reference: a folder, a GGUF file, or a Hugging Face model id.
        cache: parent folder of models that are converted from GGUF.
        read_weights: whether to check every value and to take the digest. If not, only headers are
            read, a GGUF file gives a folder with its configuration alone, and the digest is empty.

    Raises:
        ModelError: the model is unknown, has no safetensors weights, is truncated or not finite,
            needs code of its own, is quantized already, or is not a decoder-only language model; or
            its files contradict themselves, or lead out of the folder.
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
        folder = convert_gguf(path, cache)
    elif path is not None:
        folder = path
    else:
        folder = _download(reference)
    return _checked(folder, reference, read_weights=read_weights)


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
    check_folder(folder)
    config = read_config(folder)
    _check_model_type(folder, config)
    weights = find_weight_files(folder)
    check_layer_count(folder / CONFIG, config, sum(check_safetensors(file) for file in weights))
    for file in weights:
        check_tensors(file, read_values=read_weights)
    digest = _digest(folder, weights) if read_weights else ""
    return ModelFolder(folder, name, digest, stored_dtype(config, weights))


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


def _download(reference: str) -> Path:
    if not _REPOSITORY.match(reference):
        raise ModelError(
            f"model {reference!r}: no such folder or file, and not a Hugging Face model id"
        )
    try:
        return Path(huggingface_hub.snapshot_download(reference, allow_patterns=_DOWNLOADED))
    except (
        huggingface_hub.errors.HfHubHTTPError,
        huggingface_hub.errors.LocalEntryNotFoundError,
        OSError,
        ValueError,
    ) as err:
        reason = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
        raise ModelError(
            f"model {reference!r}: no such folder or file, and not to be had from Hugging Face: "
            f"{reason}"
        ) from err


def _digest(folder: Path, weights: list[Path]) -> str:
    files = [folder / name for name in _DIGESTED if (folder / name).is_file()]
    rows = [f"{file.name}:{file_sha256(file)}" for file in [*files, *weights]]
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()
