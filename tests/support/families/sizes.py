"""The size of each integer of a tiny configuration, by the field's name."""

import re

LANGUAGE_LAYERS, OTHER_LAYERS = 4, 2
"""Blocks of the language model, and of any other tower, where the configuration has one kind."""

VOCABULARY, TEXT_TOKENS = 384, 320
"""Rows of the embedding; tokens from `TEXT_TOKENS` on are special: image, audio and so on."""

HIDDEN, INTERMEDIATE = 64, 96

DEPTHS = frozenset(
    [
        "num_hidden_layers",
        "conf_num_hidden_layers",
        "num_global_layers",
        "num_layers",
        "n_layer",
        "n_layers",
        "layers",
        "depth",
        "decoder_layers",
        "encoder_layers",
        "num_blocks",
        "resampler_depth",
        "decoder_num_layers",
    ]
)
"""Names of the number of blocks."""

_KEPT = re.compile(
    r"^(num|in|out|input|audio)_channels$|^patch_size$|kernel|merge|expand"
    r"|^seed$|_period$|_interval$|_offset$|pretraining_tp"
    r"|_step$|patch_temporal|temporal_patch|factor|frequency|every|iters|stride|_time\d?$|ratio$"
    r"|^feature_layer$|vision_feature_layer|_rate$|^scale|_scale$|^hc_|floor|cycles"
)
"""Numbers that are no sizes, or small by nature."""

_SIZES: tuple[tuple[str, int], ...] = (
    (r"vocab_size|vocab_size_base", VOCABULARY),
    (r"experts?_per_tok|^moe_topk$|^moe_k$|^top_k|experts_top_k|moe_top_k", 2),
    (r"^(moe_)?(num|n)_((local|routed|total)_)?experts$", 4),
    (r"shared_experts?$|dense_replace|num_dense_layers|nextn_predict|group$|n_groups$|ngroups", 1),
    (r"rank$", 32),
    (r"^qk_head_dim$|mamba_(d_head|head_?dim)", 32),
    (r"d_ssm", 128),
    (r"channels", 32),
    (r"kpool|zero_expert", 2),
    (r"compressed_attention", 8),
    (r"(key_value|kv|query_pre|key)_heads$|num_query_groups", 2),
    (r"heads$|n_head$|attention_heads", 4),
    (r"head_?dim|d_head|kv_channels|rotary_dim|^d_kv$|head_size|rope_head|v_head", 16),
    (r"(moe|expert).*(intermediate|ffn|dim)", 32),
    (r"intermediate|ffn|mlp_dim|d_inner|d_ff|feed_forward", INTERMEDIATE),
    (r"position|seq|n_ctx|max_source|context_length", 256),
    (r"hidden|_dim$|^dim|d_model|n_embd|width|embed|output_size|input_size", HIDDEN),
    (r"window|attention_chunk|chunk_size|state_size|d_state|local_attention|block_size", 16),
    (r"topk|top_k", 4),
)
_LARGEST_OTHER = 64


def tiny_size(name: str, value: int) -> int:
    """Return the tiny size of a field; 0 and -1 mean what they did.

    Vocabularies are of one size; everything else is at most what it was.
    """
    if name == "vocab_size":
        return VOCABULARY
    if value <= 1 or _KEPT.search(name):
        return value
    for pattern, size in _SIZES:
        if re.search(pattern, name):
            return min(value, size)
    while value > _LARGEST_OTHER:
        value //= 2
    return value
