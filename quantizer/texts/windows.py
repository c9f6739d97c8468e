"""From a text to windows of tokens."""

from typing import Protocol

import torch
from torch import Tensor

from quantizer.errors import TextError
from quantizer.texts.text import TextSpec


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        """Return the token ids of `text` under the key `input_ids`."""
        ...


def make_windows(text: str, spec: TextSpec, tokenizer: Tokenizer) -> Tensor:
    """Return windows of tokens of a text: `tokenize`, then `cut_windows`.

    The whole text is tokenised at once, without special tokens, and cut into consecutive windows;
    the rest is dropped.

    Args:
        text: what `read_text` returned for `spec.source`.
        spec: which windows.
        tokenizer: the model's own.

    Returns:
        int64 [windows, tokens], on any machine the same for the same arguments.

    Raises:
        TextError: the text is too short for the windows.
    """
    return cut_windows(tokenize(text, tokenizer), spec)


def tokenize(text: str, tokenizer: Tokenizer) -> Tensor:
    """Return the tokens of a text, int64 [tokens], without special tokens."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def cut_windows(ids: Tensor, spec: TextSpec) -> Tensor:
    """Return windows of the tokens of a text, see `make_windows`.

    Raises:
        TextError: there are too few tokens for the windows.
    """
    available = len(ids) // spec.tokens
    wanted = spec.windows or available - spec.skip
    if wanted < 1 or available < spec.skip + wanted:
        raise TextError(
            f"text {spec.source!r} has {len(ids)} tokens, enough for {available} windows of "
            f"{spec.tokens}; "
            f"{spec.skip + max(wanted, 1)} are needed: give more text, or ask for fewer or "
            "shorter windows"
        )
    windows = ids[: available * spec.tokens].view(available, spec.tokens)
    if spec.seed is None:
        return windows[spec.skip : spec.skip + wanted]
    generator = torch.Generator().manual_seed(spec.seed)
    chosen = (
        torch.randperm(available, generator=generator)[spec.skip : spec.skip + wanted].sort().values
    )
    return windows[chosen]
