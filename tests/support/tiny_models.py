"""Tiny real models: random weights and a tokenizer, saved as ordinary model folders."""

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 320

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
_GATED = {**_SIZES, "intermediate_size": 96, "num_key_value_heads": 2}

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_GATED, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**_GATED),
    "qwen3": Qwen3Config(**_GATED, head_dim=16),
    "mistral": MistralConfig(**_GATED),
    "gemma3": Gemma3TextConfig(
        **_GATED,
        head_dim=16,
        sliding_window=32,
        layer_types=["sliding_attention"] * 2 + ["full_attention"],
    ),
    "opt": OPTConfig(**_SIZES, ffn_dim=96, word_embed_proj_dim=64),
    "gpt_neox": GPTNeoXConfig(**_SIZES, intermediate_size=96),
}


def make_tokenizer(vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer of so many tokens, trained on Python's own texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([topics[name] for name in sorted(topics)[:8]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def save_tiny(folder: Path, family: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Save a tiny model of a family into `folder`, the same at each call, and return the folder."""
    torch.manual_seed(7)
    model: Any = AutoModelForCausalLM.from_config(CONFIGS[family])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.15)
            elif name.endswith("bias"):
                parameter.normal_(std=0.05)
    model.to(dtype).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
