"""Promises of quantizer.texts.fit: what does not fit is refused with both numbers."""

from dataclasses import dataclass

import pytest
import torch

from quantizer.errors import ModelError, TextError
from quantizer.texts.fit import check_length, check_tokens, check_vocabulary


@dataclass
class Words:
    """A tokenizer of so many tokens."""

    size: int
    unk_token_id: int | None = None

    def __len__(self) -> int:
        """Return the number of tokens."""
        return self.size


def test_windows_up_to_the_table_of_positions_fit() -> None:
    check_length("m", 1024, 1024)
    check_length("m", 10**6, None)
    with pytest.raises(
        TextError, match="of 1025 tokens are longer than the 1024 positions of model"
    ):
        check_length("m", 1025, 1024)


def test_a_tokenizer_has_the_tokens_that_the_configuration_names() -> None:
    check_vocabulary("m", Words(100), 128, {"eos_token_id": 99})
    check_vocabulary("m", Words(100), 128, {"eos_token_id": 50256})  # not a token of this model
    with pytest.raises(ModelError, match="has 100 tokens, and lacks token 100, its eos_token_id"):
        check_vocabulary("m", Words(100), 128, {"bos_token_id": 0, "eos_token_id": 100})


def test_a_tokenizer_is_not_of_a_fraction_of_the_model() -> None:
    check_vocabulary("m", Words(50), 100, {})
    check_vocabulary("m", Words(1000), 100, {})  # its text may use the first hundred only
    with pytest.raises(ModelError, match="has 49 tokens, its embedding 100 rows; put the model's"):
        check_vocabulary("m", Words(49), 100, {})


def test_tokens_are_those_of_the_model() -> None:
    windows = torch.tensor([[0, 1, 2], [3, 4, 99]])
    check_tokens("t", windows, Words(200), 100)
    with pytest.raises(TextError, match=r"'t' has token 99, the model's embedding has 99 rows"):
        check_tokens("t", windows, Words(200), 99)


def test_a_text_is_known_to_the_tokenizer() -> None:
    windows = torch.tensor([[0, 0, 0], [1, 2, 3]])
    check_tokens("t", windows, Words(4, unk_token_id=0), 4)
    check_tokens("t", torch.zeros(2, 3), Words(4), 4)
    windows[1, 0] = 0
    with pytest.raises(TextError, match="4 of 6 tokens of text 't' are unknown"):
        check_tokens("t", windows, Words(4, unk_token_id=0), 4)
