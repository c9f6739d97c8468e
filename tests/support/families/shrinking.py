"""Shrink the configuration of any model: each size, each tower, at least one block of each kind."""

import re
from collections.abc import Sequence
from typing import Any

from tests.support.families.sizes import (
    DEPTHS,
    LANGUAGE_LAYERS,
    OTHER_LAYERS,
    tiny_size,
)
from tests.support.families.tokens import is_token

_INDICES = re.compile(r"(layers|layer_ids|idxs|idx|indexes|indices)$")
_DROPPED = frozenset(["id2label", "label2id", "dtype", "transformers_version", "architectures"])
_DEFAULTS = {"head_dim": 16, "num_key_value_heads": 2}
"""Sizes that a configuration may leave to be computed, by modules that do not compute them."""

_BOTH_KINDS = {"mlp_layer_types": ("dense", "sparse"), "indexer_types": ("full", "shared")}
"""Kinds of blocks, of which defaults may show one: the first block's, and that of the others."""

_KEY_HEADS = frozenset(["num_key_value_heads", "swa_num_key_value_heads"])
_LANGUAGE = frozenset(["", "text_config", "vlm_config", "llm_config"])


def shrunk(values: dict[str, Any], tower: str = "") -> dict[str, Any]:
    """Return a configuration with small sizes.

    Args:
        values: the configuration as `to_dict` gives it.
        tower: the key under which it is nested; empty for the outermost.
    """
    depth = next((values[key] for key in DEPTHS if isinstance(values.get(key), int)), 0)
    kept = kept_blocks(values, depth, LANGUAGE_LAYERS if tower in _LANGUAGE else OTHER_LAYERS)
    small = {}
    for key, value in values.items():
        if key in DEPTHS and isinstance(value, int):
            small[key] = len(kept) if value == depth else min(value, OTHER_LAYERS)
        elif key not in _DROPPED:
            small[key] = _shrunk_value(key, _cut(key, value, depth, kept))
    return _consistent(values, small)


def _consistent(values: dict[str, Any], small: dict[str, Any]) -> dict[str, Any]:
    """Return the small configuration with the sizes that depend on one another made to fit."""
    fitting = {
        key: default if value is None and (default := _DEFAULTS.get(key)) else value
        for key, value in small.items()
    }
    for key, kinds in _BOTH_KINDS.items():
        if len(set(fitting.get(key) or [])) == 1 and set(fitting[key]) <= set(kinds):
            fitting[key] = [kinds[min(place, 1)] for place in range(len(fitting[key]))]
    for key in _KEY_HEADS & fitting.keys():
        latent = any(name.endswith("lora_rank") for name in values)
        if latent and values[key] == values.get(key.replace("key_value", "attention")):
            fitting[key] = fitting[key.replace("key_value", "attention")]
    for rope in (fitting.get("rope_parameters"), fitting.get("rope_scaling")):
        if isinstance(rope, dict) and "mrope_section" in rope:
            rope["mrope_section"] = rope_sections(fitting)
    return fitting


def rope_sections(values: dict[str, Any]) -> list[int]:
    """Return how many rotary frequencies are for time, height and width."""
    heads = values.get("num_attention_heads", 1)
    width = (
        values.get("qk_rope_head_dim") or values.get("head_dim") or values["hidden_size"] // heads
    )
    rope = values.get("rope_parameters") or {}
    share = rope.get("partial_rotary_factor", values.get("partial_rotary_factor")) or 1
    pairs = int(width * share) // 2
    side = 3 * pairs // 8
    return [pairs - 2 * side, side, side]


def kept_blocks(values: dict[str, Any], depth: int, wanted: int) -> list[int]:
    """Return the blocks that stay: the first of each kind, and the first others up to `wanted`.

    A block's kind is its entry in each list that has one for every block, and whether it is in each
    list of indices of blocks.
    """
    seen: set[tuple[str, str]] = set()
    kept = []
    for block in range(depth):
        kinds = set()
        for key, value in values.items():
            if _is_indices(key, value, depth):
                kinds.add((key, str(block in value)))
            elif _is_per_block(value, depth):
                kinds.add((key, str(value[block])))
        if kinds - seen:
            kept.append(block)
            seen |= kinds
    others = [block for block in range(depth) if block not in kept]
    return sorted(kept + others[: max(0, wanted - len(kept))])


def _is_per_block(value: Any, depth: int) -> bool:
    return isinstance(value, list | tuple) and depth > 1 and len(value) == depth


def _is_indices(key: str, value: Any, depth: int) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and _INDICES.search(key) is not None
        and all(isinstance(each, int) and 0 <= each < depth for each in value)
        and sorted(set(value)) == list(value)
    )


def _cut(key: str, value: Any, depth: int, kept: list[int]) -> Any:
    """Return what a field says about the blocks that are kept."""
    if _is_indices(key, value, depth):
        return [kept.index(block) for block in value if block in kept]
    if _is_per_block(value, depth):
        return [value[block] for block in kept]
    if key == "per_layer_config" and isinstance(value, dict):
        return {
            str(kept.index(int(block))): of for block, of in value.items() if int(block) in kept
        }
    return value


def _shrunk_value(key: str, value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return value if is_token(key, value) else tiny_size(key, value)
    if isinstance(value, dict):
        return shrunk(value, key) if key.endswith("_config") else _shrunk_fields(value)
    if isinstance(value, Sequence) and not isinstance(value, str) and not _INDICES.search(key):
        return [_shrunk_value(key, each) for each in value]
    return value


def _shrunk_fields(values: dict[str, Any]) -> dict[str, Any]:
    small = {key: _shrunk_value(str(key), value) for key, value in values.items()}
    return _consistent(values, small)
