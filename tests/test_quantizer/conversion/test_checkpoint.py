"""Promises of quantizer.conversion.checkpoint and pack: what is written is exactly what runs."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantizer.conversion.checkpoint import checkpoint_bytes, quantized_bytes, save_checkpoint
from quantizer.conversion.pack import pack_model
from quantizer.errors import CheckpointError
from quantizer.modules.linear import QuantizedLinear
from quantizer.plans.plan import Plan
from tests.support.quantized import MENU, PackedModel, TinyFolder, TinyModel, logits_of, mixed_plan
from tests.support.quantized import PACKED_TOKENS as TOKENS

families = pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "gemma3", "opt", "gpt_neox"]
)


@families
def test_the_loaded_model_computes_what_the_packed_model_did_bit_for_bit(
    family: str, packed: PackedModel
) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed(family).folder, dtype=torch.float32)
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == len(
        packed(family).plan.layers
    )
    assert torch.equal(logits_of(model, TOKENS), packed(family).logits)


@families
def test_the_packed_model_computes_with_the_dequantized_weights(
    family: str, packed: PackedModel, tiny_model: TinyModel
) -> None:
    model = tiny_model(family)
    for name, weight in packed(family).weights.items():
        model.get_submodule(name).weight.data = weight.dequantize()
    assert torch.equal(logits_of(model, TOKENS), packed(family).logits)


@families
def test_quantized_bytes_on_disk_are_those_of_the_plan(family: str, packed: PackedModel) -> None:
    case = packed(family)
    assert quantized_bytes(case.folder, case.plan) == case.plan.weight_bytes
    assert (
        case.plan.weight_bytes < checkpoint_bytes(case.folder) < checkpoint_bytes(case.source.path)
    )
    assert checkpoint_bytes(case.folder) == sum(
        file.stat().st_size for file in case.folder.glob("*.safetensors")
    )


@families
def test_the_loaded_model_generates(family: str, packed: PackedModel) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed(family).folder, dtype=torch.float32)
    start = TOKENS[:1, :8]
    written = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        max_new_tokens=4,
        do_sample=False,
        pad_token_id=0,
    )
    assert written[0, 8] == logits_of(model, start)[0, -1].argmax()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_stored_tensors_are_loaded_as_they_are_in_any_dtype(
    dtype: torch.dtype, packed: PackedModel
) -> None:
    case = packed("opt")
    model = AutoModelForCausalLM.from_pretrained(case.folder, dtype=dtype)
    for name, weight in case.weights.items():
        module = model.get_submodule(name)
        buffers = dict(module.named_buffers())
        assert set(buffers) == set(weight.tensors)
        assert module.bias.dtype == dtype
        for key, tensor in weight.tensors.items():
            assert buffers[key].dtype == tensor.dtype
            assert torch.equal(buffers[key], tensor)
    assert model.get_input_embeddings().weight.dtype == dtype
    assert bool(torch.isfinite(logits_of(model, TOKENS)).all())


@pytest.mark.parametrize("family", ["qwen2", "opt", "gpt_neox"])
def test_biases_survive(family: str, packed: PackedModel, tiny_model: TinyModel) -> None:
    case, original = packed(family), tiny_model(family)
    model = AutoModelForCausalLM.from_pretrained(case.folder, dtype=torch.float32)
    biases = 0
    for name in case.weights:
        bias = original.get_submodule(name).bias
        assert (model.get_submodule(name).bias is None) == (bias is None)
        if bias is not None:
            assert torch.equal(model.get_submodule(name).bias, bias)
            biases += 1
    assert biases >= 9


def test_unquantized_parameters_are_stored_as_the_source_stores_them(
    packed: PackedModel, tiny_model: TinyModel
) -> None:
    case, original = packed("llama"), tiny_model("llama").state_dict()
    with safe_open(case.folder / "model.safetensors", framework="pt") as tensors:
        rest = {
            name: tensors.get_tensor(name)
            for name in tensors.keys()  # noqa: SIM118
            if name.rpartition(".")[0] not in case.weights
        }
    assert set(rest) == {
        name for name in original if name.rpartition(".")[0] not in case.weights
    } - {"lm_head.weight"}
    for name, tensor in rest.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor.float(), original[name])
    assert (
        json.loads((case.folder / "config.json").read_text())["dtype"]
        == case.source.dtype
        == "bfloat16"
    )


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_tied_embeddings_stay_tied_and_are_stored_once(family: str, packed: PackedModel) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed(family).folder)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    with safe_open(packed(family).folder / "model.safetensors", framework="pt") as tensors:
        assert "lm_head.weight" not in tensors.keys()  # noqa: SIM118  not a dict


def test_the_folder_brings_plan_and_tokenizer(packed: PackedModel) -> None:
    case = packed("llama")
    assert Plan.loads((case.folder / "plan.json").read_text(encoding="utf-8")) == case.plan
    text = "The assert statement"
    expected = AutoTokenizer.from_pretrained(case.source.path)(text)["input_ids"]
    assert AutoTokenizer.from_pretrained(case.folder)(text)["input_ids"] == expected
    said = json.loads((case.folder / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "bitwright"
    assert said["layers"] == {name: fidelity.name for name, fidelity in case.plan.by_name.items()}


def test_a_weight_that_is_stored_otherwise_than_planned_is_refused(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    plan, weights = mixed_plan(model)
    other = Plan.uniform(plan.layers, MENU[0])
    with pytest.raises(CheckpointError, match=r"the plan says int3g32"):
        pack_model(model, other, weights)


def test_bytes_on_disk_that_contradict_the_plan_are_refused(
    tiny_folder: TinyFolder, tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    plan, weights = mixed_plan(model)
    pack_model(model, plan, weights)
    other = Plan.uniform(plan.layers, MENU[0])
    with pytest.raises(CheckpointError, match=f"{plan.weight_bytes}.*{other.weight_bytes}"):
        save_checkpoint(model, tiny_folder("llama"), other, tmp_path / "out")


def test_a_folder_that_exists_is_not_written_to(
    tiny_folder: TinyFolder, tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    plan, weights = mixed_plan(model)
    pack_model(model, plan, weights)
    with pytest.raises(FileExistsError):
        save_checkpoint(model, tiny_folder("llama"), plan, tmp_path)
    assert not list(tmp_path.iterdir())
