"""Load models, configurations and tokenizers from checked folders, by transformers.

transformers resolves its classes when they are first used, so importing this module stays cheap.
"""

import copy
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from quantizer.errors import ModelError
from quantizer.models.config import CONFIG, read_config, sanitized
from quantizer.models.folder import ModelFolder
from quantizer.models.weight_files import find_weight_files
from quantizer.running.memory import to_device
from quantizer.structure.linear_form import to_linear_form

LOCAL_ONLY: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
"""Arguments of every `from_pretrained`: run no code of a model, and download nothing."""

_RUST_PANIC = "PanicException"
"""What tokenizers raises for some broken files.

It is not an `Exception`, and no module exports it.
"""
_REASON_CHARACTERS = 400


def load_model(folder: ModelFolder, dtype: torch.dtype, device: str) -> Any:
    """Return the model of a checked folder, in evaluation mode and without gradients.

    Args:
        folder: what `find_model` returned.
        dtype: dtype of the parameters.
        device: `cpu` or `cuda`.

    Raises:
        ModelError: transformers cannot build the model, or its files are too small for the
            configuration, or lack tensors.
        MemoryShort: it does not fit on the device.
    """
    config = load_config(folder)
    with library_errors_as_model_error(f"model {folder.name!r} cannot be loaded"):
        files = find_weight_files(folder.path)
        bare = build_bare(config)
        check_weight_count(folder.name, bare, sum(file.stat().st_size for file in files))
        model, info = model_class(config).from_pretrained(
            folder.path,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `check_complete` says more than transformers does
            use_safetensors=True,
            **LOCAL_ONLY,
        )
    check_complete(folder.name, info)
    _check_ties(folder.name, model, bare)
    model.requires_grad_(requires_grad=False)
    to_linear_form(model, check=True)
    return to_device(model, device).eval()


def meta_model(folder: ModelFolder) -> Any:
    """Return the model of a checked folder on the meta device: its structure without weights.

    It is in linear form, as `load_model` gives it.

    Raises:
        ModelError: transformers does not accept the configuration.
    """
    model = bare_model(folder)
    to_linear_form(model)
    return model


def bare_model(folder: ModelFolder) -> Any:
    """Return the model of a checked folder on the meta device, as transformers builds it.

    Raises:
        ModelError: transformers does not accept the configuration, or it has more weights than the
            files can hold.
    """
    config = load_config(folder)
    with library_errors_as_model_error(f"model {folder.name!r} cannot be built"):
        model = build_bare(config)
    if folder.stored is not None:
        check_weight_count(folder.name, model, folder.stored.file_bytes)
    return model


def model_class(config: Any) -> Any:
    """Return the class of transformers that a configuration describes.

    It is the one that the configuration names, if that is a class of its type for generating text;
    so a multi-modal model keeps all its parts. Else it is the usual one of the type.

    Raises:
        ModelError: the type has none.
    """
    classes = [
        each
        for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
        if type(config) in mapping
        for each in [mapping[type(config)]]
    ]
    named = getattr(config, "architectures", None) or []
    for each in classes:
        if each.__name__ in named:
            return each
    if not classes:
        raise ModelError(
            f"model type {config.model_type!r} has no class for generating text in transformers"
        )
    return classes[0]


def build_bare(config: Any) -> Any:
    """Return the model of a transformers configuration, without storage for its weights."""
    config = copy.deepcopy(config)
    with torch.device("meta"):
        return model_class(config)(config).eval()


def load_config(folder: ModelFolder) -> Any:
    """Return the transformers configuration of a checked folder, sanitized.

    The folder stays as it is; transformers reads a sanitized copy of its `config.json`.

    Raises:
        ModelError: transformers does not accept it.
    """
    values = sanitized(read_config(folder.path))
    with tempfile.TemporaryDirectory() as copied:
        (Path(copied) / CONFIG).write_text(json.dumps(values), encoding="utf-8")
        with library_errors_as_model_error(f"model {folder.name!r} cannot be loaded"):
            config = transformers.AutoConfig.from_pretrained(copied, **LOCAL_ONLY)
    config.name_or_path = str(folder.path)
    return config


def load_tokenizer(folder: ModelFolder) -> Any:
    """Return the tokenizer of a checked folder.

    Raises:
        ModelError: there is none, or it needs code of its own.
    """
    config = load_config(folder)
    with library_errors_as_model_error(f"model {folder.name!r} has no usable tokenizer"):
        return transformers.AutoTokenizer.from_pretrained(folder.path, config=config, **LOCAL_ONLY)


def check_weight_count(name: str, model: Any, limit: int) -> None:
    """Refuse a model whose configuration has more weights than its files can hold.

    Args:
        name: of the model, for the message.
        model: what `build_bare` made of its configuration.
        limit: the most weights that the files can hold.

    Raises:
        ModelError: the configuration has more.
    """
    weights = sum(parameter.numel() for parameter in model.parameters())
    if weights > limit:
        raise ModelError(
            f"model {name!r} has {weights} weights by its configuration, its files can hold at "
            f"most {limit}"
        )


def _check_ties(name: str, model: Any, bare: Any) -> None:
    """Refuse a model whose files hold different values for parameters that should be one.

    transformers then leaves them apart, though the configuration, which a checkpoint inherits, says
    that they are tied.

    Raises:
        ModelError: naming the parameters.
    """
    found = dict(model.named_parameters(remove_duplicate=False))
    for tied, source in bare.all_tied_weights_keys.items():
        if found.get(tied) is not found.get(source):
            raise ModelError(
                f"model {name!r} holds different values for {tied!r} and {source!r}, which its "
                "configuration ties; set tie_word_embeddings to false in its config.json"
            )


def check_complete(name: str, loading_info: dict[str, Any]) -> None:
    """Refuse a model of which transformers found only some tensors, or some of other shapes.

    Raises:
        ModelError: naming the first that is missing, or of another shape.
    """
    for tensor, stored, expected in sorted(loading_info["mismatched_keys"]):
        raise ModelError(
            f"model {name!r} stores {tensor!r} with shape {tuple(stored)}, its configuration says "
            f"{tuple(expected)}; the two do not belong together"
        )
    missing = sorted(loading_info["missing_keys"])
    if missing:
        raise ModelError(
            f"model {name!r} lacks {len(missing)} tensors, {missing[0]!r} first; its files are "
            "incomplete"
        )


@contextmanager
def library_errors_as_model_error(fault: str) -> Iterator[None]:
    """Turn whatever a library raises while it reads a model into one `ModelError` on one line.

    Args:
        fault: first part of the message; the library's own, at most 400 characters of it, follows.
    """
    try:
        yield
    except ModelError:
        raise
    except BaseException as err:
        if not isinstance(err, Exception) and type(err).__name__ != _RUST_PANIC:
            raise
        reason = " ".join(str(err).split()) or type(err).__name__
        if len(reason) > _REASON_CHARACTERS:
            reason = reason[:_REASON_CHARACTERS] + "..."
        raise ModelError(f"{fault}: {reason}") from err
