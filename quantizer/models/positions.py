"""How long a text a model can read, where it looks its positions up in a table."""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

_TABLE = re.compile(r"wpe|embed_positions|positions_embed|position_embeddings|pos_encoding")
"""Names of position tables in the models of transformers: embeddings, or buffers."""
_OTHER_INPUT = re.compile(r"vision|image|img|audio")
"""Parts of models for what is no text."""
_LENGTH_FIELDS = {"mpt": "max_seq_len"}
"""Fields of the configurations of models that bias attention by a table of distances."""


def position_limit(model: Any) -> int | None:
    """Return the largest number of tokens in a window, None where there is no limit.

    Models with rotary positions that are computed, and most with biased attention, have none: they
    read longer windows, only less well.

    Args:
        model: also one on the meta device.
    """
    config = model.config.get_text_config()
    limits = [*_table_limits(model)]
    if config.model_type in _LENGTH_FIELDS:
        limits.append(int(getattr(config, _LENGTH_FIELDS[config.model_type])))
    return min(limits, default=None)


def _table_limits(model: Any) -> Iterator[int]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and _is_table(name):
            yield module.num_embeddings - _unused_rows(module)
    for name, buffer in model.named_buffers():
        if _is_table(name):
            yield buffer.shape[0]


def _is_table(name: str) -> bool:
    return bool(_TABLE.fullmatch(name.rpartition(".")[2])) and not _OTHER_INPUT.search(name)


def _unused_rows(table: nn.Embedding) -> int:
    """Return how many rows go before that of the first position."""
    offset = getattr(table, "offset", None)
    if isinstance(offset, int):
        return offset
    is_plain = type(table) is nn.Embedding
    return table.padding_idx + 1 if is_plain and table.padding_idx is not None else 0
