"""Windows of text that fit the model: their length, their tokens, and its tokenizer."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from quantizer.models.folder import ModelFolder
from quantizer.models.loading import bare_model, load_tokenizer
from quantizer.models.positions import position_limit
from quantizer.texts.fit import check_length, check_tokens, check_vocabulary
from quantizer.texts.text import TextSpec, is_at_hand, read_text
from quantizer.texts.windows import cut_windows, tokenize
from service.request.request import RunRequest

_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True, slots=True)
class TextReader:
    """What a model takes for text: its tokenizer, tokens and positions.

    Attributes:
        name: of the model, for messages.
        tokenizer: that of transformers.
        rows: rows of the embedding.
        positions: largest length of a window; None where there is no limit.
    """

    name: str
    tokenizer: Any
    rows: int
    positions: int | None

    @classmethod
    def of(cls, model: ModelFolder) -> "TextReader":
        """Return the reader of a model, after checking that the tokenizer is its own.

        Raises:
            ModelError: the tokenizer cannot be used, or is that of another model.
        """
        skeleton = bare_model(model)
        rows = skeleton.get_input_embeddings().num_embeddings
        tokenizer = load_tokenizer(model)
        check_vocabulary(model.name, tokenizer, rows, special_tokens(skeleton.config))
        return cls(model.name, tokenizer, rows, position_limit(skeleton))

    def windows(self, text: str, specs: Mapping[str, TextSpec]) -> dict[str, Tensor]:
        """Return windows of a text, tokenised once, after checking that they fit the model.

        Args:
            text: what `quantizer.texts.text.read_text` returned.
            specs: which windows, by names that are given back.

        Raises:
            TextError: they are too long for the model, the text is too short for them, or it has
                tokens that the model lacks.
        """
        for spec in specs.values():
            check_length(self.name, spec.tokens, self.positions)
        ids = tokenize(text, self.tokenizer)
        found = {}
        for name, spec in specs.items():
            found[name] = cut_windows(ids, spec)
            check_tokens(spec.source, found[name], self.tokenizer, self.rows)
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

    Raises as `TextReader` does.
    """
    reader = TextReader.of(model)
    by_source: dict[str, dict[str, TextSpec]] = {}
    for name, spec in _specs(request):
        by_source.setdefault(spec.source, {})[name] = spec
    for source, specs in by_source.items():
        if is_at_hand(source):
            reader.windows(read_text(source), specs)


def _specs(request: RunRequest) -> Iterator[tuple[str, TextSpec]]:
    """Yield the windows of a run; those that need most of a text come first."""
    amounts = request.amounts
    yield "guard", amounts.guard
    yield "calibration", amounts.calibration
    yield "probes", amounts.probes
    if request.effort.calibration != 1:
        yield "all", replace(amounts.calibration, windows=0, seed=None)
    yield "evaluation", amounts.evaluation
