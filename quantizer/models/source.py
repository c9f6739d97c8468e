"""Where a model comes from, whether it is safe and whole, and how it is loaded.

Nothing that a model folder brings is ever executed: weights are read from safetensors and GGUF
files only, and models that need code of their own are refused. No file is given to a library before
`quantizer.models.safety` has checked it.
"""

import copy
import hashlib
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from quantizer.durable import file_sha256
from quantizer.errors import ModelError
from quantizer.models.gguf_header import check_gguf
from quantizer.models.safety import (
    abbreviated,
    check_folder,
    check_layers,
    check_safetensors,
    file_inside,
    read_config,
    read_shards,
    sanitized,
)
from quantizer.running.memory import place

log = logging.getLogger("bitwright")

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_DOWNLOADED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
_REPOSITORY = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
_GGUF_DTYPE, _GGUF_NAME = "float16", "model.gguf"
_QUANT_METHOD = "bitwright"
_RUST_PANIC = "PanicException"
"""What tokenizers raises for some broken files; no Exception, and nowhere to be imported from."""
_REASON_LENGTH = 400
_LOCAL: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
"""How transformers is called: it runs no code of a model, and fetches nothing."""
_LOADED_PARTS = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A local folder with an ordinary transformers model.

    Attributes:
        path: the folder.
        name: what the user called the model.
        sha256: digest of everything in the folder that decides what the model computes.
        dtype: the dtype in which the weights are stored, such as `bfloat16`.
    """

    path: Path
    name: str
    sha256: str
    dtype: str


def find_model(reference: str, cache: Path, *, read_weights: bool = True) -> ModelFolder:
    """Return the folder of the model that `reference` names, after checking that it can be loaded safely.

    Args:
        reference: a folder, a GGUF file, or a Hugging Face model id.
        cache: folder for models that had to be converted.
        read_weights: whether to check every value, and to take the digest. Without it, only headers
            are read, a GGUF file gives a folder that holds its configuration alone, and the digest
            is empty.

    Raises:
        ModelError: the model is unknown, holds no safetensors weights, is truncated or not finite,
            needs code of its own, is quantized already, or is no decoder-only language model; or
            its files claim what cannot be, or lead elsewhere.
    """
    path = _local(reference)
    if path is not None and path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(
                f"model {reference!r} is a file; give a folder, a .gguf file, or a Hugging Face id"
            )
        check_gguf(path)
        if not read_weights:
            return ModelFolder(_outline_gguf(path, cache), reference, "", _GGUF_DTYPE)
        folder = _convert_gguf(path, cache)
    elif path is not None:
        folder = path
    else:
        folder = _download(reference)
    _check_folder(folder)
    config = read_config(folder)
    _check_config(folder, config)
    weights = _weight_files(folder)
    check_layers(folder / "config.json", config, sum(check_safetensors(file) for file in weights))
    for file in weights:
        _check_weights(file, values=read_weights)
    return ModelFolder(
        folder,
        reference,
        _digest(folder, weights) if read_weights else "",
        _stored_dtype(config, weights),
    )


def load_model(folder: ModelFolder, dtype: torch.dtype, device: str) -> Any:
    """Return the model of a checked folder, in evaluation mode, with parameters in `dtype`.

    Raises:
        ModelError: transformers cannot build it, or its files are too small for it, or lack
            weights.
        MemoryShort: it does not fit on the device.
    """
    from transformers import AutoModelForCausalLM  # noqa: PLC0415  seconds to import; errors above come at once

    config = load_config(folder)
    with _refusing(f"model {folder.name!r} cannot be loaded"):
        _check_size(
            folder.name, config, sum(file.stat().st_size for file in _weight_files(folder.path))
        )
        model, info = AutoModelForCausalLM.from_pretrained(
            folder.path,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            use_safetensors=True,
            **_LOCAL,
        )
    _check_complete(folder.name, info)
    model.requires_grad_(requires_grad=False)
    return place(model, device).eval()


def load_config(folder: ModelFolder) -> Any:
    """Return the transformers configuration of a checked folder, without fields that name code, kernels or machines.

    The folder stays as it is; transformers reads a sanitized copy of its `config.json`.

    Raises:
        ModelError: transformers does not accept it.
    """
    from transformers import AutoConfig  # noqa: PLC0415  see load_model

    values = sanitized(read_config(folder.path))
    with tempfile.TemporaryDirectory() as copied:
        (Path(copied) / "config.json").write_text(json.dumps(values), encoding="utf-8")
        with _refusing(f"model {folder.name!r} cannot be loaded"):
            config = AutoConfig.from_pretrained(copied, **_LOCAL)
    config.name_or_path = str(folder.path)
    return config


def load_tokenizer(folder: ModelFolder) -> Any:
    """Return the tokenizer of a checked folder.

    Raises:
        ModelError: there is none, or it needs code of its own.
    """
    from transformers import AutoTokenizer  # noqa: PLC0415  see load_model

    config = load_config(folder)
    with _refusing(f"model {folder.name!r} has no usable tokenizer"):
        return AutoTokenizer.from_pretrained(folder.path, config=config, **_LOCAL)


def _check_size(name: str, config: Any, most_weights: int) -> None:
    """Refuse a configuration of more weights than its files can hold, before anything of that size is allocated."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415  see load_model

    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
    described = sum(parameter.numel() for parameter in outline.parameters())
    if described > most_weights:
        raise ModelError(
            f"model {name!r} has {described} weights by its configuration, its files can hold at "
            f"most {most_weights}"
        )


def _check_complete(name: str, info: dict[str, Any]) -> None:
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"model {name!r} lacks {len(missing)} tensors, {missing[0]!r} first; its files are "
            "incomplete"
        )


@contextmanager
def _refusing(fault: str) -> Iterator[None]:
    """Turn whatever a library raises while it reads a model into one ModelError, in one line of bounded length."""
    try:
        yield
    except ModelError:
        raise
    except BaseException as err:
        if not isinstance(err, Exception) and type(err).__name__ != _RUST_PANIC:
            raise
        reason = " ".join(str(err).split()) or type(err).__name__
        raise ModelError(
            f"{fault}: "
            f"{reason if len(reason) <= _REASON_LENGTH else reason[:_REASON_LENGTH] + '...'}"
        ) from err


def _local(reference: str) -> Path | None:
    """Return the file or folder of this name, or None where there is none."""
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
    from huggingface_hub import snapshot_download  # noqa: PLC0415  only needed here
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        return Path(snapshot_download(reference, allow_patterns=_DOWNLOADED))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as err:
        reason = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
        raise ModelError(
            f"model {reference!r}: no such folder or file, and not to be had from Hugging Face: "
            f"{reason}"
        ) from err


def check_checkpoint(folder: Path) -> None:
    """Refuse a folder that cannot be a checkpoint of this package, before transformers loads it.

    Raises:
        ModelError: its files claim what cannot be, lead elsewhere, or are no safetensors, or it is
            quantized by another method.
    """
    _check_folder(folder)
    read_config(folder, quant_method=_QUANT_METHOD)
    for file in _weight_files(folder):
        check_safetensors(file)


def _check_folder(folder: Path) -> None:
    try:
        check_folder(folder)
    except OSError as err:
        raise ModelError(f"folder {str(folder)!r} cannot be read: {err}") from err


def _check_config(folder: Path, config: dict[str, Any]) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: PLC0415
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: PLC0415

    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        if config.get("auto_map"):
            raise ModelError(
                f"model in {str(folder)!r} needs code of its own (auto_map, model_type "
                f"{abbreviated(kind)}); such code is never run. "
                "Convert the model to a type that transformers knows"
            )
        raise ModelError(
            f"model in {str(folder)!r} has model_type {abbreviated(kind)}, unknown to the installed "
            "transformers"
        )
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(
            f"model in {str(folder)!r} has model_type {kind!r}, which is no decoder-only language "
            "model"
        )


def _weight_files(folder: Path) -> list[Path]:
    """Return the weight files that transformers would load.

    The single file before the shards of an index.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [file_inside(folder, single.name)]
    if index.exists():
        return read_shards(folder, index)
    pickled = sorted(file.name for pattern in _PICKLED for file in folder.glob(pattern))
    if pickled:
        raise ModelError(
            f"folder {str(folder)!r} holds pickled weights only ({pickled[0]}); loading them can "
            "run any code. "
            "Convert them to safetensors"
        )
    raise ModelError(
        f"folder {str(folder)!r} has no weights: neither model.safetensors nor an index of shards"
    )


def _check_weights(file: Path, *, values: bool) -> None:
    """Refuse a file that safetensors does not open and, if `values` are to be read, one that holds any that are not finite."""
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys() if values else ():
                tensor = tensors.get_tensor(name)
                if tensor.is_floating_point() and tensor.element_size() == 1:
                    raise ModelError(
                        f"tensor {name!r} in {str(file)!r} is stored in 8 bits; give the original "
                        "in 16 bits or more"
                    )
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    raise ModelError(
                        f"tensor {name!r} in {str(file)!r} holds NaN or infinite values; get the "
                        "weights anew"
                    )
    except (SafetensorError, OSError, RuntimeError) as err:
        raise ModelError(f"weights {str(file)!r} are damaged or truncated: {err}") from err


def _digest(folder: Path, weights: list[Path]) -> str:
    files = [folder / name for name in _LOADED_PARTS if (folder / name).is_file()]
    rows = [f"{file.name}:{file_sha256(file)}" for file in [*files, *weights]]
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def _stored_dtype(config: dict[str, Any], weights: list[Path]) -> str:
    named = config.get("dtype") or config.get("torch_dtype")
    dtype = getattr(torch, named, None) if isinstance(named, str) else None
    if isinstance(named, str) and isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return named
    with safe_open(weights[0], framework="pt") as tensors:
        names = list(tensors.keys())
        if not names:
            raise ModelError(f"weights {str(weights[0])!r} hold no tensors")
        return str(tensors.get_tensor(names[0]).dtype).removeprefix("torch.")


@contextmanager
def _alone(file: Path) -> Iterator[Path]:
    """Give a folder in which a GGUF file stands alone, so that nothing beside it is read."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / _GGUF_NAME).symlink_to(file.resolve())
        yield Path(folder)


def _convert_gguf(file: Path, cache: Path) -> Path:
    """Return an ordinary model folder made from a GGUF file, once for each file content.

    A GGUF file names no dtype; its weights are stored in 16 bits, which holds its block scales
    exactly.
    """
    folder = cache / f"gguf-{file_sha256(file)[:24]}"
    if folder.is_dir():
        return folder
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415  see load_model

    log.info("converting %s to a model folder, once", file)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with _refusing(f"GGUF file {str(file)!r} cannot be read"), _alone(file) as place:
            given: dict[str, Any] = {"gguf_file": _GGUF_NAME, **_LOCAL}
            _check_size(
                str(file), AutoConfig.from_pretrained(place, **given), 8 * file.stat().st_size
            )
            read, info = AutoModelForCausalLM.from_pretrained(
                place, dtype=torch.float32, output_loading_info=True, **given
            )
            _check_complete(str(file), info)
            del given[
                "local_files_only"
            ]  # would be written into tokenizer_config.json, and so change the digest
            tokenizer = AutoTokenizer.from_pretrained(place, **given)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    config = copy.deepcopy(read.config)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict())
    if all(bool(torch.isfinite(tensor.half()).all()) for tensor in model.state_dict().values()):
        model.half()
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    temporary.rename(folder)
    return folder


def _outline_gguf(file: Path, cache: Path) -> Path:
    """Return a folder with the configuration of a GGUF file, and no weights."""
    from transformers import AutoConfig  # noqa: PLC0415  see load_model

    with _refusing(f"GGUF file {str(file)!r} cannot be read"), _alone(file) as place:
        config = AutoConfig.from_pretrained(place, gguf_file=_GGUF_NAME, **_LOCAL)
    folder = cache / f"outline-{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:24]}"
    config.save_pretrained(folder)
    return folder


def skeleton(model: ModelFolder) -> Any:
    """Return the model without storage for its weights."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415  seconds to import; bad input is told before

    config = load_config(model)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
