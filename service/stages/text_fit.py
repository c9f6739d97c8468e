"""Windows of text that fit the model: their length, their tokens, and its tokenizer."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from quantizer.models.folder import ModelFolder
from quantizer.models.loading import load_tokenizer, meta_model
from quantizer.models.positions import position_limit
from quantizer.texts.fit import check_length, check_tokens, check_vocabulary
from quantizer.texts.text import TextSpec, is_at_hand, read_text
from quantizer.texts.windows import cut_windows, tokenize
from service.request.request import RunRequest

_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def fitting_windows(
    model: ModelFolder, text: str, specs: Mapping[str, TextSpec]
) -> dict[str, Tensor]:
    """Return windows of a text, tokenised once, after checking that they fit the model.

    Args:
        model: that is to read them.
        text: what `quantizer.texts.text.read_text` returned.
        specs: which windows, by names that are given back.

    Raises:
        TextError: they are too long for the model, the text is too short for them, or it has tokens
            that the model lacks.
        ModelError: the tokenizer cannot be used, or is that of another model.
    """
    skeleton = meta_model(model)
    positions = position_limit(skeleton)
    for spec in specs.values():
        check_length(model.name, spec.tokens, positions)
    rows = skeleton.get_input_embeddings().num_embeddings
    tokenizer = load_tokenizer(model)
    check_vocabulary(model.name, tokenizer, rows, special_tokens(skeleton.config))
    ids = tokenize(text, tokenizer)
    found = {}
    for name, spec in specs.items():
        found[name] = cut_windows(ids, spec)
        check_tokens(spec.source, found[name], tokenizer, rows)
    return found


def special_tokens(config: Any) -> dict[str, int]:
    """Return the tokens that a transformers configuration names, by field."""
    text = config.get_text_config()
    found = {}
    for field in _SPECIAL:
        value = getattr(text, field, None)
        tokens = value if isinstance(value, list | tuple) else [value]
        known = [token for token in tokens if isinstance(token, int)]
        if known:
            found[field] = max(known)
    return found


def check_texts(model: ModelFolder, request: RunRequest) -> None:
    """Refuse a run whose texts do not fit the model; texts that would be downloaded are left out.

    Raises as `fitting_windows` does.
    """
    by_source: dict[str, dict[str, TextSpec]] = {}
    for name, spec in _specs(request):
        by_source.setdefault(spec.source, {})[name] = spec
    for source, specs in by_source.items():
        if is_at_hand(source):
            fitting_windows(model, read_text(source), specs)


def _specs(request: RunRequest) -> Iterator[tuple[str, TextSpec]]:
    """Yield the windows of a run; those that need most of a text come first."""
    amounts = request.amounts
    yield "guard", amounts.guard
    yield "calibration", amounts.calibration
    yield "probes", amounts.probes
    if request.effort.calibration != 1:
        yield "all", replace(amounts.calibration, windows=0, seed=None)
    yield "evaluation", amounts.evaluation
