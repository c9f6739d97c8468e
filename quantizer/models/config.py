"""The `config.json` of a model from an untrusted source: what it may say, and what is left out.

transformers follows some fields of a configuration to code, to other files, or to the network. This
module refuses such fields, or drops them where a model works without. Plain Python.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantizer.errors import ModelError
from quantizer.models.files import (
    CONFIG_BYTES,
    abbreviated,
    file_inside,
    nested_values,
    read_object,
)

CONFIG = "config.json"

_IMPLEMENTATION_NAMES = ("attn_implementation", "experts_implementation")
_IMPLEMENTATIONS = frozenset(
    [
        *_IMPLEMENTATION_NAMES,
        *(f"_{name}" for name in _IMPLEMENTATION_NAMES),
        *(f"_{name}_internal" for name in _IMPLEMENTATION_NAMES),
    ]
)
"""Fields that name the code for attention or experts; other values are kernels of a hub."""
_BUILT_IN = re.compile(r"eager|sdpa|flash_attention_\d|flex_attention|batched_mm|grouped_mm")
_REDIRECTIONS = frozenset(["configuration_files", "transformers_weights", "fast_tokenizer_files"])
"""Fields that name files to load instead of the usual ones."""
QUANTIZATION = "quantization_config"
"""Field that says how a model is quantized."""
_QUANTIZED = frozenset([QUANTIZATION, "compression_config"])
_DROPPED = frozenset(
    [
        "auto_map",
        "custom_pipelines",
        "trust_remote_code",
        "name_or_path",
        *_IMPLEMENTATION_NAMES,
        "fusion_config",
        "kernel_config",
        "use_kernels",
        "device_map",
        "distributed_config",
        "base_model_tp_plan",
        "base_model_pp_plan",
        "base_model_fsdp_plan",
    ]
)
_PRIVATE_FIELDS_KEPT = frozenset(["_sliding_window_pattern"])
_LAYER_COUNTS = frozenset(["num_hidden_layers", "num_layers", "n_layer", "n_layers"])


def read_config(folder: Path, quant_method: str | None = None) -> dict[str, Any]:
    """Return the content of `config.json` after checking that it only describes a model.

    Args:
        folder: the model folder.
        quant_method: the quantization method that the model may have; None for an unquantized one.

    Raises:
        ModelError: the file is missing or unreadable, the model is quantized by another method, or
            a field names kernels, other files, or a network address.
    """
    if not (folder / CONFIG).exists():
        raise ModelError(
            f"folder {str(folder)!r} has no {CONFIG}; give a transformers model folder"
        )
    config = read_object(file_inside(folder, CONFIG), CONFIG_BYTES)
    allowed = quant_method is not None and _quant_method(config) == quant_method
    check_fields(
        folder / CONFIG,
        {key: value for key, value in config.items() if key != QUANTIZATION or not allowed},
    )
    return config


def sanitized(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a configuration without fields that name code, devices or private state.

    Nested configurations, whose keys end in `_config`, are treated likewise.
    """
    public = {
        key: value
        for key, value in config.items()
        if key not in _DROPPED and (not key.startswith("_") or key in _PRIVATE_FIELDS_KEPT)
    }
    return {
        key: sanitized(value) if key.endswith("_config") and isinstance(value, dict) else value
        for key, value in public.items()
    }


def check_layer_count(file: Path, config: Mapping[str, Any], tensors: int) -> None:
    """Refuse a configuration with more layers than there are tensors.

    Building such a model could take any amount of time and memory.

    Args:
        file: path of the configuration, for the message.
        config: its content.
        tensors: number of stored tensors.

    Raises:
        ModelError: naming the field and its value.
    """
    for _, key, value in nested_values(config):
        if key in _LAYER_COUNTS and isinstance(value, int | float) and value > tensors:
            raise ModelError(
                f"{str(file)!r} says {key} {abbreviated(value)}, more than the {tensors} tensors "
                "that are stored"
            )


def check_fields(file: Path, values: Mapping[str, Any]) -> None:
    """Refuse fields that would make transformers load something else than the checked files.

    Args:
        file: path of the configuration, for messages.
        values: its content.

    Raises:
        ModelError: a field says that the model is quantized, or names kernels, other files, or an
            address.
    """
    for _, key, value in nested_values(values):
        if key in _QUANTIZED and value:
            raise ModelError(
                f"model in {str(file.parent)!r} is quantized already; give the original"
            )
        if key in _IMPLEMENTATIONS and not _built_in(value):
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


def _built_in(implementation: object) -> bool:
    """Return whether an implementation, or each of several, comes with transformers itself."""
    named = implementation.values() if isinstance(implementation, dict) else [implementation]
    return all(
        each is None or (isinstance(each, str) and _BUILT_IN.fullmatch(each)) for each in named
    )


def _quant_method(config: Mapping[str, Any]) -> object:
    described = config.get(QUANTIZATION)
    return described.get("quant_method") if isinstance(described, dict) else None
