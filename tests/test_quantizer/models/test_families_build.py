"""A tiny model of every decoder type of the installed transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from quantizer.models.weight_files import check_tensors
from tests.support.families.building import save_family, tiny_config, tiny_family
from tests.support.families.decoders import (
    RULES,
    all_types,
    decoder_types,
    left_out,
    model_class,
    reason_left_out,
)
from tests.support.families.sizes import TEXT_TOKENS
from tests.support.sampling import sampled

IN_GATE = ("llama", "mixtral", "qwen3_next", "llava")
TOLERANCE = 1e-4
MOST_BLOCKS, MOST_WEIGHTS = 5, 10_000_000
KINDS = ("layer_types", "layers_block_type", "mlp_layer_types", "indexer_types")
COUNTED_OFTEN = ("hrm_text", "longcat_flash")
"""Types that count a block once for each of its runs, or attentions."""


def tokens() -> Tensor:
    """Return one window of twelve tokens of text."""
    return torch.randint(1, TEXT_TOKENS, (1, 12), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(model: Any, window: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=window, use_cache=False).logits
    return logits


@pytest.mark.parametrize("model_type", sampled(all_types(), lambda each: each in IN_GATE))
def test_a_type_is_left_out_or_predicts_the_next_token(model_type: str, tmp_path: Path) -> None:
    if reason_left_out(model_type):
        return
    model, window = tiny_family(model_type), tokens()
    parameters = list(model.parameters())
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    assert sum(parameter.numel() for parameter in parameters) < MOST_WEIGHTS
    logits = logits_of(model, window)
    assert logits.shape[:2] == window.shape
    assert logits.isfinite().all()

    window[0, -1] = window[0, -1] % (TEXT_TOKENS - 1) + 1
    changed = logits_of(model, window)
    assert (changed[0, :-1] - logits[0, :-1]).abs().max() < TOLERANCE
    assert (changed[0, -1] - logits[0, -1]).abs().max() > TOLERANCE

    folder = save_family(model_type, tmp_path / "model")
    check_tensors(folder / "model.safetensors", read_values=True)
    again = model_class(model_type).from_pretrained(folder, dtype=torch.float32).eval()
    assert (logits_of(again, tokens()) - logits).abs().max() < TOLERANCE


@pytest.mark.parametrize("model_type", sampled(all_types(), lambda each: each in IN_GATE))
def test_few_blocks_show_every_kind_of_block(model_type: str) -> None:
    if reason_left_out(model_type):
        return
    usual = transformers.CONFIG_MAPPING[model_type]().get_text_config(decoder=True)
    tiny = tiny_config(model_type).get_text_config(decoder=True)
    if model_type not in COUNTED_OFTEN:
        assert getattr(tiny, "num_hidden_layers", 1) <= MOST_BLOCKS
    for name in KINDS:
        assert set(getattr(usual, name, None) or []) <= set(getattr(tiny, name, None) or [])


@pytest.mark.long
def test_every_type_is_a_decoder_or_is_left_out_by_a_rule() -> None:
    assert sorted([*decoder_types(), *left_out()]) == all_types()
    assert set(left_out().values()) == set(RULES)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [(("llama", 3), ("llama", 3), True), (("llama", 3), ("llama", 4), False)],
)
def test_the_seed_decides_the_weights(
    one: tuple[str, int], other: tuple[str, int], *, same: bool
) -> None:
    first, second = (tiny_family(*each).state_dict() for each in (one, other))
    assert all(first[name].equal(second[name]) for name in first) is same
