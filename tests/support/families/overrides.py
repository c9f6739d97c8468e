"""What a few model types need beyond smaller numbers."""

from typing import Any

_SECTIONS = {"rope_parameters": {"mrope_section": [2, 3, 3]}}
_TEXT_SECTIONS = {"text_config": _SECTIONS}
"""Left to themselves, these take the sections of heads of 128 columns."""

_SLIDING, _FULL, _LINEAR = "sliding_attention", "full_attention", "linear_attention"
_ALTERNATING = [_SLIDING, _FULL, _SLIDING, _FULL]
_HYBRID = [_LINEAR, _FULL, _LINEAR, _FULL]
_SPARSE = ["dense", "sparse", "sparse", "sparse"]
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
_THETA = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_COMPASS = {"rope_parameters": {_FULL: _THETA, _SLIDING: _THETA}}
_CONVOLUTIONS = {"layer_types": ["conv", _FULL, "conv", _FULL]}
_CHOSEN_BLOCKS = {"layer_types": [_FULL, "minimax_m3_sparse", _FULL, "minimax_m3_sparse"]}
_SHARED_KEYS = {"num_kv_shared_layers": 2, "layer_types": _ALTERNATING}
_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "ple_layer_ids": [1],
    "eos_token_id": 0,
}
_PLAIN_VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 16,
    "model_args": {"embed_dim": 64},
}
"""A vision tower of transformers in place of one of timm, which is not installed."""

OVERRIDES: dict[str, dict[str, Any]] = {
    "apertus1p5": {
        "vision_config": {"codebook_size": 16},
        "audio_config": {"codebook_size": 16},
        "image_token_offset": 352,
        "audio_token_offset": 368,
    },
    "bamba": {"attn_layer_indices": [1, 3]},
    "chameleon": {"vocabulary_map": {"<image>": 350}},
    "cohere_compass": {"text_config": _COMPASS},
    "cohere_compass_text": _COMPASS,
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_ocr2": {"text_config": {**_EXPERTS, "mlp_layer_types": _SPARSE}},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dory": {  # counts attention and MLP of a block as two
        "layer_types": [_SLIDING, "mlp", _FULL, "mlp", _SLIDING, "mlp", _FULL, "mlp"],
        "num_hidden_layers": 8,
        "n_input_layers": 2,
        "n_recurrent_layers": 4,
        "n_output_layers": 2,
    },
    "dots1": {**_EXPERTS, "first_k_dense_replace": 1},
    "emu3": {"vocabulary_map": {"<image>": 350, "<|extra_200|>": 351}},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {"mrope_section": [3, 3, 2]}}},
    "dots3_note": {"text_config": {"head_dim": 32}},
    "dots3_note_text": {"head_dim": 32},
    "falcon_h1": {"mamba_d_head": 32},
    "fast_vlm": {"vision_config": _PLAIN_VISION},
    "gemma3n": {
        "text_config": _SHARED_KEYS,
        "vision_config": {"vocab_offset": 352, "vocab_size": 16},
        "audio_config": {"vocab_offset": 368, "vocab_size": 16},
    },
    "gemma3n_text": _SHARED_KEYS,
    "glm46v": _TEXT_SECTIONS,
    "glm4v": _TEXT_SECTIONS,
    "glm4v_moe": {"text_config": {"rope_parameters": {"mrope_section": [2, 1, 1]}}},
    "glm5_next": {
        "text_config": {
            "layer_types": [_LINEAR, "indexed_attention", "indexed_attention", _LINEAR],
            "mlp_layer_types": _SPARSE,
            "indexer_types": ["full", "full", "shared", "full"],
        }
    },
    "glm_ocr": _TEXT_SECTIONS,
    "glmga": _TEXT_SECTIONS,
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0], [1, 1]],
        "spatial_target_layers": [0, 1, 2, 3],
        "downsample_rate": "1/2",
    },
    "granitemoe_swa": {"shared_intermediate_size": 32},
    "granitemoehybrid": {"layer_types": _HYBRID},
    "granitemoeshared": {"shared_intermediate_size": 32},
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": 16},
    "hunyuan_vl": _TEXT_SECTIONS,
    "jamba": {"attn_layer_period": 4, "attn_layer_offset": 2},
    "lfm2": _CONVOLUTIONS,
    "lfm2_moe": {**_CONVOLUTIONS, "num_dense_layers": 1},
    "lfm2_vl": {"text_config": _CONVOLUTIONS},
    "mamba2": {"head_dim": 32},
    "minimax_m3_vl": {"text_config": _CHOSEN_BLOCKS},
    "minimax_m3_vl_text": _CHOSEN_BLOCKS,
    "mistral4": {"head_dim": 32},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "nemotron_h_omni": {"audio_config": {"projection_hidden_size": 64, "projection_bias": False}},
    "paddleocr_vl": _TEXT_SECTIONS,
    "perception_lm": {"vision_config": _PLAIN_VISION},
    "qwen2_5_omni_thinker": _TEXT_SECTIONS,
    "qwen2_5_vl": _TEXT_SECTIONS,
    "qwen2_vl": _TEXT_SECTIONS,
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "step3p7": {"text_config": {"sliding_window": 16, "layer_types": _ALTERNATING}},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},  # rounds queries up to 64 columns
    "zamba": {
        "layers_block_type": [_LINEAR, "hybrid", _LINEAR, "hybrid"],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {
        "layers_block_type": [_LINEAR, "hybrid", _LINEAR, "hybrid"],
        "hybrid_layer_ids": [1, 3],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
}
"""Fields by model type; a nested configuration is given as a dictionary of some of its fields."""

SAVED_AS_LOADED = frozenset(["shieldgemma2"])
"""Types that transformers saves under the names of published files, and then does not find."""
