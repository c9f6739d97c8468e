"""Promises of quantizer.models.source for GGUF files and for dry runs.

What is converted is the same model, and what is not read.
"""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from quantizer.errors import ModelError
from quantizer.models.loading import load_model, load_tokenizer
from quantizer.models.source import find_model
from tests.support.edited_models import FILE, find, tensors, without
from tests.support.quantized import PACKED_TOKENS, Edited, TinyFolder, TinyModel, logits_of

TEXT = "The assert statement, in Python"
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _write_gguf(path: Path, model: Any, tokenizer_file: Path) -> None:
    """Write a llama with tied embeddings in float32; names and order of tensors are llama.cpp's."""
    config, writer = model.config, gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokenizer = json.loads(tokenizer_file.read_text(encoding="utf-8"))["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(tokenizer["vocab"], key=tokenizer["vocab"].get))
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["merges"]])
    writer.add_eos_token_id(0)
    for name, parameter in model.named_parameters():
        module = name.removesuffix(".weight")
        block, values = "", parameter.detach()
        if module not in NAMES:
            _, _, index, module = module.split(".", 3)
            block = f"blk.{index}."
        if module.endswith(
            ("q_proj", "k_proj")
        ):  # llama.cpp interleaves the two halves of each head
            values = (
                values.view(-1, 2, config.head_dim // 2, config.hidden_size)
                .transpose(1, 2)
                .reshape(values.shape)
            )
        writer.add_tensor(f"{block}{NAMES[module]}.weight", np.ascontiguousarray(values.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gguf_file(
    tiny_folder: TinyFolder, tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return the tiny llama as a GGUF file."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    _write_gguf(path, tiny_model("llama"), tiny_folder("llama").path / "tokenizer.json")
    return path


def test_a_gguf_file_is_the_model_that_it_was_made_of(
    gguf_file: Path, tiny_folder: TinyFolder, tiny_model: TinyModel, tmp_path: Path
) -> None:
    found = find_model(str(gguf_file), tmp_path)
    assert (found.name, found.dtype, found.path.parent) == (str(gguf_file), "float16", tmp_path)
    converted = load_model(found, torch.float32, "cpu")
    expected = logits_of(tiny_model("llama"), PACKED_TOKENS)
    assert torch.allclose(logits_of(converted, PACKED_TOKENS), expected, atol=1e-3)
    expected_ids = load_tokenizer(tiny_folder("llama"))(TEXT)["input_ids"]
    assert load_tokenizer(found)(TEXT, add_special_tokens=False)["input_ids"] == expected_ids


def test_a_gguf_file_is_converted_once(gguf_file: Path, tmp_path: Path) -> None:
    first = find_model(str(gguf_file), tmp_path)
    times = {file.name: file.stat().st_mtime_ns for file in first.path.iterdir()}
    renamed = tmp_path / "other.gguf"
    renamed.write_bytes(gguf_file.read_bytes())
    second = find_model(str(renamed), tmp_path)
    assert (second.path, second.sha256) == (first.path, first.sha256)
    assert {file.name: file.stat().st_mtime_ns for file in second.path.iterdir()} == times


def test_a_truncated_gguf_file_is_refused_and_leaves_nothing(
    gguf_file: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(gguf_file.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"GGUF file '.*broken\.gguf' cannot be read"):
        find_model(str(broken), tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*"))


def test_a_dry_run_on_a_gguf_file_finds_the_configuration_alone(
    gguf_file: Path, tmp_path: Path
) -> None:
    found = find_model(str(gguf_file), tmp_path, read_weights=False)
    assert found.sha256 == ""
    assert json.loads((found.path / "config.json").read_text())["num_hidden_layers"] == 3
    assert not list(found.path.glob("*.safetensors"))


def test_a_dry_run_does_not_stand_in_the_way_of_the_real_one(
    gguf_file: Path, tmp_path: Path
) -> None:
    find_model(str(gguf_file), tmp_path, read_weights=False)
    found = find_model(str(gguf_file), tmp_path)
    assert found.sha256
    assert (found.path / FILE).is_file()


def test_a_dry_run_on_a_folder_reads_no_values(edited: Edited) -> None:
    folder = edited(tensors(lambda all_: all_["model.norm.weight"].fill_(float("nan"))))
    found = find_model(str(folder), folder.parent / "cache", read_weights=False)
    assert (found.path, found.dtype, found.sha256) == (folder, "bfloat16", "")
    with pytest.raises(ModelError, match="NaN"):
        find(folder)


def test_a_dry_run_refuses_weights_that_are_truncated_or_missing(edited: Edited) -> None:
    folder = edited(lambda folder: (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-100]))
    with pytest.raises(ModelError, match="damaged or truncated"):
        find_model(str(folder), folder.parent / "cache", read_weights=False)
    without(FILE)(folder)
    with pytest.raises(ModelError, match="no weights"):
        find_model(str(folder), folder.parent / "cache", read_weights=False)
