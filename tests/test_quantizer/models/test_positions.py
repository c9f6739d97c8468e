"""Promises of quantizer.models.positions: a model reads windows up to the limit, and no longer."""

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig

from quantizer.models.positions import position_limit
from tests.support.tiny_models import CONFIGS

LIMIT = 48
_SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_OLD = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": LIMIT}
_TOKENS = {"bos_token_id": 0, "eos_token_id": 0}

LIMITED: dict[str, PreTrainedConfig] = {
    "gpt2": transformers.GPT2Config(**_OLD, **_TOKENS),
    "gptj": transformers.GPTJConfig(**_OLD, rotary_dim=8, **_TOKENS),
    "codegen": transformers.CodeGenConfig(**{**_OLD, "n_head": 4}, rotary_dim=8, **_TOKENS),
    "gpt_bigcode": transformers.GPTBigCodeConfig(**_OLD, **_TOKENS),
    "opt": transformers.OPTConfig(
        **_SIZES, ffn_dim=32, word_embed_proj_dim=32, max_position_embeddings=LIMIT
    ),
    "biogpt": transformers.BioGptConfig(
        **_SIZES, intermediate_size=32, max_position_embeddings=LIMIT
    ),
    "roberta": transformers.RobertaConfig(
        **_SIZES, intermediate_size=32, max_position_embeddings=LIMIT + 2, is_decoder=True
    ),
    "mpt": transformers.MptConfig(
        d_model=32, n_heads=2, n_layers=1, vocab_size=64, max_seq_len=LIMIT
    ),
}


def make(config: PreTrainedConfig, device: str = "cpu") -> Any:
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config).eval()


def read(model: Any, tokens: int) -> None:
    with torch.no_grad():
        model(input_ids=torch.full((1, tokens), 5), use_cache=False)


@pytest.mark.parametrize("family", list(LIMITED))
def test_a_model_with_a_table_of_positions_reads_no_more_than_the_limit(family: str) -> None:
    model = make(LIMITED[family])
    assert position_limit(model) == LIMIT
    assert position_limit(make(LIMITED[family], "meta")) == LIMIT
    read(model, LIMIT)
    with pytest.raises((IndexError, RuntimeError)):
        read(model, LIMIT + 1)


@pytest.mark.parametrize("family", [family for family in CONFIGS if family != "opt"])
def test_a_model_that_computes_its_positions_reads_any_window(family: str) -> None:
    model = make(CONFIGS[family])
    assert position_limit(model) is None
    read(model, 2 * CONFIGS[family].max_position_embeddings)
