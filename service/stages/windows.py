"""Windows of tokens that a model is run on."""

import hashlib
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Windows:
    """Token windows and where they come from.

    Attributes:
        tokens: int64 [windows, tokens], in the memory of the processor.
        sha256: digest of the tokens.
        source: what the user called the text.
    """

    tokens: Tensor
    sha256: str
    source: str

    @classmethod
    def of(cls, tokens: Tensor, source: str) -> "Windows":
        """Return these windows with their digest."""
        return cls(tokens, hashlib.sha256(tokens.numpy().tobytes()).hexdigest(), source)

    def first_tokens(self, count: int) -> "Windows":
        """Return the first `count` tokens of each window."""
        return Windows.of(self.tokens[:, :count].contiguous(), self.source)
