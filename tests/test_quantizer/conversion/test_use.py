"""What users of transformers and PEFT do with a packed model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantizer.kernels.path import KERNELS_VARIABLE
from quantizer.modules.linear import QuantizedLinear
from tests.support.quantized import PACKED_TOKENS as TOKENS
from tests.support.quantized import PackedModel, logits_of


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32} | options)


def stored(model: Any) -> dict[str, Tensor]:
    """Return copies of all packed tensors by name."""
    return {
        f"{name}.{leaf}": buffer.clone()
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
        for leaf, buffer in module.named_buffers()
    }


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_saving_what_was_loaded_gives_the_same_files_tensors_and_results(
    family: str, packed: PackedModel, tmp_path: Path
) -> None:
    case = packed(family)
    load(case.folder, dtype="auto").save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(logits_of(again, TOKENS), case.logits)
    assert again.config.quantization_config.layers == {
        name: fidelity.name for name, fidelity in case.plan.by_name.items()
    }
    assert (tmp_path / "model.safetensors").read_bytes() == (
        case.folder / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_devices_can_be_chosen_by_a_map(device_map: Any, packed: PackedModel) -> None:
    case = packed("llama")
    assert torch.equal(logits_of(load(case.folder, device_map=device_map), TOKENS), case.logits)


def test_blocks_that_lie_on_disk_compute_the_same(packed: PackedModel, tmp_path: Path) -> None:
    case = packed("qwen2")
    places = {
        "model.embed_tokens": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    model = load(case.folder, device_map=places, offload_folder=tmp_path, offload_buffers=True)
    assert torch.equal(logits_of(model, TOKENS), case.logits)


def test_a_compiled_model_computes_the_same(packed: PackedModel) -> None:
    model = load(packed("llama").folder)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        logits_of(compiled, TOKENS), logits_of(model, TOKENS), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_greedy_continuations_are_those_of_the_reference(
    family: str, packed: PackedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, start = load(packed(family).folder), TOKENS[:, :20]
    given = {
        "attention_mask": torch.ones_like(start),
        "max_new_tokens": 40,
        "min_new_tokens": 40,
        "do_sample": False,
    }
    found = model.generate(start, **given, pad_token_id=0)
    monkeypatch.setenv(KERNELS_VARIABLE, "reference")
    assert torch.equal(model.generate(start, **given, pad_token_id=0), found)


def adapted(folder: Path) -> Any:
    """Return a packed model with untrained adapters."""
    torch.manual_seed(0)
    return get_peft_model(
        load(folder), LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    )


def test_adapters_are_trained_beside_packed_layers_which_stay_as_they_are(
    packed: PackedModel, tmp_path: Path
) -> None:
    case = packed("llama")
    model = adapted(case.folder)
    before = stored(model)
    assert torch.equal(logits_of(model, TOKENS), case.logits)  # an untrained adapter adds nothing
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * 3  # two matrices for each of two layers in three blocks
    optimizer, losses = torch.optim.Adam(trained, lr=1e-2), []
    for _ in range(8):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    after = stored(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(case.folder), tmp_path)
    assert torch.equal(logits_of(again, TOKENS), logits_of(model, TOKENS))
    with again.disable_adapter():
        assert torch.equal(logits_of(again, TOKENS), case.logits)


def test_gradients_of_adapters_are_those_beside_expanded_layers(packed: PackedModel) -> None:
    case = packed("opt")
    packed_model, expanded_model = load(case.folder), load(case.source.path)
    for name, weight in case.weights.items():
        expanded_model.get_submodule(name).weight.data = weight.dequantize()
    options: Any = {
        "r": 4,
        "target_modules": ["q_proj", "fc2"],
        "init_lora_weights": False,
        "bias": "all",
    }
    model, expanded = (
        get_peft_model(each, LoraConfig(**options)) for each in (packed_model, expanded_model)
    )
    expanded.load_state_dict(model.state_dict(), strict=False)
    for each in (model, expanded):
        each(input_ids=TOKENS, labels=TOKENS).loss.backward()
    truth = {
        name: parameter.grad
        for name, parameter in expanded.named_parameters()
        if parameter.grad is not None
    }
    found = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    assert found.keys() == truth.keys()
    assert any(name.endswith("bias") for name in found)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, truth[name], rtol=1e-3, atol=1e-6)


def test_merging_an_adapter_into_codes_fails_instead_of_losing_it(packed: PackedModel) -> None:
    with pytest.raises(AttributeError):
        adapted(packed("llama").folder).merge_and_unload()
