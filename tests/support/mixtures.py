"""Tiny mixtures of experts, and other models whose layers transformers does not store as linear."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.tiny_models import VOCABULARY, make_tokenizer

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_SMALL = {"head_dim": 16, "moe_intermediate_size": 48, "num_experts_per_tok": 2}

MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {**_SMALL, "num_experts": 4},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "moe_intermediate_size": 48,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
    },
    "llama4_text": {
        "head_dim": 16,
        "num_local_experts": 4,
        "intermediate_size_mlp": 96,
        "interleave_moe_layer_step": 1,
        "attention_chunk_size": 64,
        "pad_token_id": None,
    },
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {
            "ffn_hidden_size": 96,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "hidden_size": 64,
        },
    },
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "jetmoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 32},
}
"""Configuration values of each family, beside the sizes that all share."""

TRANSPOSED: dict[str, dict[str, Any]] = {"gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4}}
"""Families with transposed layers."""


def build_mixture(family: str) -> Any:
    """Return a tiny model of a family in float32, as transformers builds it."""
    values = {**MIXTURES, **TRANSPOSED}[family]
    config = AutoConfig.for_model(family, **{**_SIZES, **values})
    torch.manual_seed(7)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
            elif name.endswith("bias"):
                parameter.normal_(std=0.05)
    return model.eval().requires_grad_(requires_grad=False)


def save_mixture(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save a tiny model of a family and a tokenizer into `folder`, and return the folder."""
    build_mixture(family).to(dtype).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
