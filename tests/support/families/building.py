"""Build and save a tiny model of any decoder type."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from tests.support.families.decoders import LANGUAGE_ALONE, whole_class
from tests.support.families.overrides import OVERRIDES, SAVED_AS_LOADED
from tests.support.families.shrinking import shrunk
from tests.support.families.tokens import renumbered
from tests.support.families.vision import register_plain_towers
from tests.support.tiny_models import make_tokenizer

_SPREAD, _BIAS_SPREAD = 0.12, 0.05
"""Standard deviations of matrices and biases, by which inputs of 64 columns keep their size."""
_LARGEST = 1e4
"""Of anything stored: an untrained model may hold infinite limits, which no file may."""

register_plain_towers()


def tiny_config(model_type: str) -> Any:
    """Return a small configuration of a model type, with at least one block of each kind."""
    config_class = transformers.CONFIG_MAPPING[model_type]
    small = renumbered(shrunk(_with_every_tower(config_class()).to_dict()))
    return config_class(**_merged(small, OVERRIDES.get(model_type, {})), dtype="float32")


def tiny_family(model_type: str, seed: int = 0) -> Any:
    """Return a tiny model of a decoder type in float32, the same for the same seed."""
    model = _whole(model_type, seed)
    return model.language_model if model_type in LANGUAGE_ALONE else model


def save_family(model_type: str, folder: Path, seed: int = 0) -> Path:
    """Save the whole model of `tiny_family` and a tokenizer into `folder`, and return the folder.

    `model_class` of the type loads it.
    """
    model = _whole(model_type, seed)
    model.save_pretrained(folder, save_original_format=model_type not in SAVED_AS_LOADED)
    make_tokenizer().save_pretrained(folder)
    return folder


def _whole(model_type: str, seed: int) -> Any:
    torch.manual_seed(seed)
    model = whole_class(model_type)._from_config(tiny_config(model_type))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            owner = model.get_submodule(name.rpartition(".")[0])
            if name.endswith("bias"):
                parameter.normal_(std=_BIAS_SPREAD)
            elif parameter.ndim > 1 and _is_plain(owner):
                parameter.normal_(std=_SPREAD)
        for stored in model.state_dict().values():
            if stored.is_floating_point():
                stored.clamp_(-_LARGEST, _LARGEST)
    return model.eval()


def _with_every_tower(config: Any) -> Any:
    for tower, spec in config.sub_configs_defaults.items():
        if getattr(config, tower) is None:
            setattr(config, tower, spec.create_subconfig(tower, {})[0])
    return config


def _is_plain(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding) or "Experts" in type(module).__name__


def _merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    new = dict(values)
    for key, change in changes.items():
        nested = isinstance(change, dict) and isinstance(new.get(key), dict)
        new[key] = _merged(new[key], change) if nested else change
    return new
