"""Sizes of a model are those of the tensors in its files, each of which counts once."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantizer.errors import ModelError
from quantizer.models.loading import meta_model
from quantizer.models.source import find_model
from quantizer.structure.blocks import find_layers
from service.stages.model_sizes import ModelSizes, measure_sizes
from tests.support.commands import bitwright, bitwright_json, run_options

FILE = "model.safetensors"


def sizes_of(folder: Path, cache: Path, *, read_weights: bool = False) -> ModelSizes:
    model = find_model(str(folder), cache, read_weights=read_weights)
    skeleton = meta_model(model)
    return measure_sizes(model, skeleton, find_layers(skeleton))


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny llama, in bfloat16."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def change(model: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(model / FILE)
    edit(tensors)
    save_file(tensors, model / FILE, metadata={"format": "pt"})


def set_config(model: Path, **values: object) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize("named", ["float32", "float16", None])
def test_what_the_configuration_says_about_the_dtype_does_not_count(
    named: str | None, model: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    set_config(model, dtype=named)
    assert find_model(str(model), tmp_path / "cache", read_weights=False).dtype == "bfloat16"
    sizes = sizes_of(model, tmp_path / "cache")
    assert sizes == sizes_of(tiny_llama, tmp_path / "cache")
    assert sizes.item_bytes == 2
    assert sizes.file_bytes == (model / FILE).stat().st_size
    assert sizes.file_bytes == sizes.layer_bytes + sizes.unquantized_bytes


def test_weights_that_are_shipped_twice_count_once(
    model: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    (model / "original").mkdir()
    for name in ("consolidated.safetensors", "original/model.safetensors", "pytorch_model.bin"):
        shutil.copyfile(model / FILE, model / name)
    before = sizes_of(tiny_llama, tmp_path / "cache", read_weights=True)
    assert sizes_of(model, tmp_path / "cache", read_weights=True) == before
    estimate = bitwright_json(
        *run_options(model, tmp_path / "cache", tmp_path / "out"), "--dry-run"
    )
    assert estimate["original_bytes"] == before.file_bytes


def test_a_tensor_in_another_dtype_has_its_own_size(
    model: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    """The query projection of one block and all norms are in float32."""
    wide = {"model.layers.0.self_attn.q_proj.weight"}

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        wide.update(name for name in tensors if name.endswith("norm.weight"))
        tensors.update({name: tensors[name].float() for name in wide})

    change(model, widen)
    before, sizes = (sizes_of(each, tmp_path / "cache") for each in (tiny_llama, model))
    queries = 64 * 64
    norms = sizes.part_bytes["norms"] // 2
    assert sizes.layer_bytes == before.layer_bytes + 2 * queries
    assert sizes.file_bytes - before.file_bytes == pytest.approx(2 * (queries + norms), abs=100)
    assert (sizes.item_bytes, sizes.part_bytes["norms"]) == (2, before.part_bytes["norms"])
    # a checkpoint holds what is beside its layers as it is in the file
    wider = sizes.unquantized_bytes - before.unquantized_bytes
    assert wider == pytest.approx(2 * norms, abs=100)


def test_a_budget_in_bytes_holds_whatever_the_file_stores(model: Path, tmp_path: Path) -> None:
    """Embedding and norms are in float32; the tied head is stored, too."""

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        wide = [name for name in tensors if "embed" in name or name.endswith("norm.weight")]
        tensors.update({name: tensors[name].float() for name in wide})
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    change(model, widen)
    options = run_options(model, tmp_path / "cache", tmp_path / "out", "150000B")
    assert bitwright_json(*options)["checkpoint_bytes"] <= 150_000
    delivered = load_file(tmp_path / "out" / FILE)
    assert "lm_head.weight" not in delivered
    for name, tensor in load_file(model / FILE).items():
        if name in delivered:
            assert torch.equal(delivered[name], tensor)
            assert delivered[name].dtype == tensor.dtype


def test_a_tied_head_that_is_stored_too_counts_as_part_of_the_file_only(
    model: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    embedding = "model.embed_tokens.weight"
    change(model, lambda all_: all_.update({"lm_head.weight": all_[embedding].clone()}))
    before, sizes = (sizes_of(each, tmp_path / "cache") for each in (tiny_llama, model))
    assert sizes.file_bytes - before.file_bytes == pytest.approx(2 * 320 * 64, abs=100)
    assert sizes.unquantized_bytes == pytest.approx(before.unquantized_bytes, abs=100)


def test_a_head_that_should_be_tied_and_differs_is_refused(model: Path, tmp_path: Path) -> None:
    embedding = "model.embed_tokens.weight"
    change(model, lambda all_: all_.update({"lm_head.weight": all_[embedding] + 1}))
    done = bitwright(*run_options(model, tmp_path / "cache", tmp_path / "out"))
    assert done.returncode == 2
    sentence = " ".join(done.stderr.split())
    assert "different values for 'lm_head.weight' and 'model.embed_tokens.weight'" in sentence
    assert "set tie_word_embeddings to false" in sentence


def test_floats_of_8_bits_are_refused_by_the_header(model: Path, tmp_path: Path) -> None:
    name = "model.norm.weight"
    change(model, lambda all_: all_.update({name: all_[name].to(torch.float8_e4m3fn)}))
    with pytest.raises(ModelError, match=r"'model\.norm\.weight' in .* in 8 bits or fewer"):
        find_model(str(model), tmp_path / "cache", read_weights=False)
    refused = bitwright(*run_options(model, tmp_path / "cache", tmp_path / "out"), "--dry-run")
    assert refused.returncode == 2


def test_a_run_delivers_what_the_dry_run_said(model: Path, tmp_path: Path) -> None:
    set_config(model, dtype="float32")
    options = run_options(model, tmp_path / "cache", tmp_path / "out")
    estimate = bitwright_json(*options, "--dry-run")
    report = bitwright_json(*options)
    assert report["original_bytes"] == estimate["original_bytes"]
    assert report["model"]["dtype"] == "bfloat16"
    assert report["unquantized_bytes"] < estimate["original_bytes"] / 2
