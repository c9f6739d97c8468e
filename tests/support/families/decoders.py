"""Which model types of the installed transformers are decoders of text, by rules."""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import transformers
from transformers.models.auto import modeling_auto

_CAUSAL = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
_WITH_IMAGES = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
_MASKED = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES

LANGUAGE_ALONE = frozenset(["llama4"])
"""Types whose whole model fails at every call; their language model alone works."""


@cache
def decoder_types() -> tuple[str, ...]:
    """Return every model type that predicts the next token of text from text alone, sorted."""
    return tuple(each for each in all_types() if each not in left_out())


@cache
def left_out() -> dict[str, str]:
    """Return each other type of the tables of language models, and why it is left out."""
    reasons = {each: reason_left_out(each) for each in all_types()}
    return {each: reason for each, reason in reasons.items() if reason}


def reason_left_out(model_type: str) -> str:
    """Return why a type is no decoder of text; empty if it is one."""
    return next((reason for reason, applies in RULES.items() if applies(model_type)), "")


def all_types() -> list[str]:
    """Return every type of the tables of language models, sorted; loads no class of a model."""
    return sorted({*_CAUSAL, *_WITH_IMAGES})


def model_class(model_type: str) -> Any:
    """Return the class that predicts tokens: with a type's other towers, unless that fails."""
    alone = model_type in LANGUAGE_ALONE
    return getattr(transformers, _CAUSAL[model_type]) if alone else whole_class(model_type)


def whole_class(model_type: str) -> Any:
    """Return the class of a type's whole model, with its other towers where it has some."""
    return getattr(transformers, (_CAUSAL | _WITH_IMAGES)[model_type])


def _field(model_type: str, name: str) -> Any:
    """Return the default of a field of the type's configuration, None if it has none."""
    return getattr(transformers.CONFIG_MAPPING[model_type], name, None)


def _towers(model_type: str) -> str:
    return " ".join(transformers.CONFIG_MAPPING[model_type].sub_configs_defaults)


def _arguments(model_type: str) -> dict[str, inspect.Parameter]:
    arguments = dict(inspect.signature(model_class(model_type).forward).parameters)
    del arguments["self"]
    return arguments


def _needs_more_than_text(model_type: str) -> bool:
    return model_class(model_type).main_input_name != "input_ids" or any(
        argument.default is inspect.Parameter.empty
        and argument.kind is not inspect.Parameter.VAR_KEYWORD
        for name, argument in _arguments(model_type).items()
        if name != "input_ids"
    )


def _attends_both_ways(model_type: str) -> bool:
    language = transformers.CONFIG_MAPPING[model_type]().get_text_config(decoder=True)
    return getattr(language, "use_bidirectional_attention", None) is True


RULES: dict[str, Callable[[str], bool]] = {
    "encoder and decoder, or the decoder half of such a model": lambda each: (
        _field(each, "is_encoder_decoder") is True
    ),
    "an encoder, which fills masks": lambda each: each in _MASKED,
    "half of an encoder-decoder: it attends to an encoder's states": lambda each: (
        _field(each, "is_decoder") is False and "encoder_hidden_states" in _arguments(each)
    ),
    "hears or speaks: its text goes along with sound": lambda each: (
        "audio" in _towers(each) and "vision" not in _towers(each)
    ),
    "reads the words in any order": lambda each: "perm_mask" in _arguments(each),
    "a draft head that reads another model's states": lambda each: (
        "shared_kv_states" in _arguments(each)
    ),
    "does not predict the next token": lambda each: (
        "text" not in (getattr(model_class(each), "output_modalities", None) or ())
    ),
    "needs more than text": lambda each: each == "idefics" or _needs_more_than_text(each),
    "attends to later tokens of a prompt": lambda each: (
        each == "cpmant" or _attends_both_ways(each)
    ),
}
