"""Whether windows of text fit the model that is to read them."""

from typing import Protocol

from torch import Tensor

from quantizer.errors import ModelError, TextError

_MOST_UNKNOWN = 0.5
_FEWEST_TOKENS = 0.5
"""Share of the rows of the embedding; rows are added for speed, but not as many again."""


class Vocabulary(Protocol):
    """The part of a transformers tokenizer that is used here."""

    unk_token_id: int | None

    def __len__(self) -> int:
        """Return the number of tokens."""
        ...


def check_length(name: str, tokens: int, positions: int | None) -> None:
    """Refuse windows that are longer than a model's table of positions.

    Args:
        name: of the model, for the message.
        tokens: length of a window.
        positions: what the table holds; None where there is no table.

    Raises:
        TextError: they are longer.
    """
    if positions is not None and tokens > positions:
        raise TextError(
            f"windows of {tokens} tokens are longer than the {positions} positions of model "
            f"{name!r}; ask for shorter windows"
        )


def check_vocabulary(name: str, vocabulary: Vocabulary, rows: int, special: dict[str, int]) -> None:
    """Refuse a tokenizer that lacks tokens of its model: it is that of another one, or cut off.

    Args:
        name: of the model, for messages.
        vocabulary: its tokenizer.
        rows: number of rows of its embedding.
        special: tokens that its configuration names. Those beyond the rows are left out: the
            configuration does not mean them.

    Raises:
        ModelError: tokens are missing.
    """
    size = len(vocabulary)
    for field, token in special.items():
        if size <= token < rows:
            raise ModelError(
                f"the tokenizer of model {name!r} has {size} tokens, and lacks token {token}, its "
                f"{field}; put the model's own tokenizer into its folder"
            )
    if size < _FEWEST_TOKENS * rows:
        raise ModelError(
            f"the tokenizer of model {name!r} has {size} tokens, its embedding {rows} rows; put "
            "the model's own tokenizer into its folder"
        )


def check_tokens(source: str, windows: Tensor, vocabulary: Vocabulary, rows: int) -> None:
    """Refuse windows of tokens that a model does not have, or that say little of the text.

    Args:
        source: what the user called the text.
        windows: int64, of any shape.
        vocabulary: of the tokenizer.
        rows: number of rows of the model's embedding.

    Raises:
        TextError: a token is beyond the rows, or most are unknown.
    """
    largest = int(windows.max())
    if largest >= rows:
        raise TextError(
            f"text {source!r} has token {largest}, the model's embedding has {rows} rows; put the "
            "model's own tokenizer into its folder"
        )
    unknown = 0
    if vocabulary.unk_token_id is not None:
        unknown = int((windows == vocabulary.unk_token_id).sum())
    if unknown > _MOST_UNKNOWN * windows.numel():
        raise TextError(
            f"{unknown} of {windows.numel()} tokens of text {source!r} are unknown to the model's "
            "tokenizer; give a text in a language that it knows"
        )
