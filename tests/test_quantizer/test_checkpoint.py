"""Promises of quantizer.checkpoint and quantizer.integration: what is written is what runs, and transformers loads it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantizer.checkpoint import checkpoint_bytes, pack_model, quantized_bytes, save_checkpoint
from quantizer.errors import CheckpointError
from quantizer.fidelity import Fidelity
from quantizer.layers import find_layers
from quantizer.linear import QuantizedLinear
from quantizer.plan import Plan
from quantizer.source import ModelFolder
from quantizer.weight import QuantizedWeight
from tests.test_quantizer.helpers import ROOT, TinyFolder, TinyModel, random_weight, token_windows

TOKENS = token_windows(2, 40)
MENU = (Fidelity.uniform(3, 32), Fidelity(2, 4, 0.4, 32), Fidelity.uniform(8, 64), Fidelity.uniform(2, 32))
families = pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3", "opt", "gpt_neox"])


@dataclass(frozen=True)
class Packed:
    """A packed model that was saved.

    Attributes:
        folder: the checkpoint.
        source: the original.
        plan: fidelities of its layers.
        weights: stored forms.
        logits: of the packed model in memory, in float32, before it was saved.
    """

    folder: Path
    source: ModelFolder
    plan: Plan
    weights: dict[str, QuantizedWeight]
    logits: Tensor


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    logits: Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return logits


def _stored(model: Any) -> tuple[Plan, dict[str, QuantizedWeight]]:
    """Return a plan of mixed fidelities and random stored forms for it, with scales of a useful size."""
    layers = find_layers(model)
    plan = Plan(layers, tuple(MENU[index % len(MENU)] for index in range(len(layers))))
    weights = {}
    for seed, (layer, fidelity) in enumerate(zip(plan.layers, plan.fidelities, strict=True)):
        weight = random_weight(fidelity, layer.out_features, layer.in_features, seed)
        small = {name: tensor * 0.02 if name.endswith("_scales") else tensor for name, tensor in weight.tensors.items()}
        weights[layer.name] = QuantizedWeight(fidelity, layer.out_features, layer.in_features, small)
    return plan, weights


@pytest.fixture(scope="module")
def packed(tiny_folder: TinyFolder, tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Packed]:
    """Return the saved packed model of a family, made once."""
    made: dict[str, Packed] = {}

    def get(family: str) -> Packed:
        if family not in made:
            model, source = tiny_model(family), tiny_folder(family)
            plan, weights = _stored(model)
            pack_model(model, plan, weights)
            logits, folder = _logits(model), tmp_path_factory.mktemp("packed") / family
            save_checkpoint(model, source, plan, folder)
            made[family] = Packed(folder, source, plan, weights, logits)
        return made[family]

    return get


@families
def test_the_loaded_model_computes_what_the_packed_model_did_bit_for_bit(family: str, packed: Callable[[str], Packed]) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed(family).folder, dtype=torch.float32)
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == len(packed(family).plan.layers)
    assert torch.equal(_logits(model), packed(family).logits)


@families
def test_the_packed_model_computes_with_the_dequantized_weights(
    family: str, packed: Callable[[str], Packed], tiny_model: TinyModel
) -> None:
    model = tiny_model(family)
    for name, weight in packed(family).weights.items():
        model.get_submodule(name).weight.data = weight.dequantize()
    assert torch.equal(_logits(model), packed(family).logits)


@families
def test_quantized_bytes_on_disk_are_those_of_the_plan(family: str, packed: Callable[[str], Packed]) -> None:
    case = packed(family)
    assert quantized_bytes(case.folder, case.plan) == case.plan.weight_bytes
    assert case.plan.weight_bytes < checkpoint_bytes(case.folder) < checkpoint_bytes(case.source.path)
    assert checkpoint_bytes(case.folder) == sum(file.stat().st_size for file in case.folder.glob("*.safetensors"))


@families
def test_the_loaded_model_generates(family: str, packed: Callable[[str], Packed]) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed(family).folder, dtype=torch.float32)
    written = model.generate(TOKENS[:1, :8], max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    assert written.shape == (1, 12)
    assert written[0, 8] == _logits_of(model, TOKENS[:1, :8])[0, -1].argmax()


@torch.no_grad()
def _logits_of(model: Any, tokens: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=tokens).logits
    return logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_stored_tensors_are_loaded_as_they_are_in_any_dtype(dtype: torch.dtype, packed: Callable[[str], Packed]) -> None:
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
    assert bool(torch.isfinite(_logits(model)).all())


@pytest.mark.parametrize("family", ["qwen2", "opt", "gpt_neox"])
def test_biases_survive(family: str, packed: Callable[[str], Packed], tiny_model: TinyModel) -> None:
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
    packed: Callable[[str], Packed], tiny_model: TinyModel
) -> None:
    case, original = packed("llama"), tiny_model("llama").state_dict()
    with safe_open(case.folder / "model.safetensors", framework="pt") as tensors:
        rest = {name: tensors.get_tensor(name) for name in tensors.keys() if name.rpartition(".")[0] not in case.weights}  # noqa: SIM118
    assert set(rest) == {name for name in original if name.rpartition(".")[0] not in case.weights} - {"lm_head.weight"}
    for name, tensor in rest.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor.float(), original[name])
    assert json.loads((case.folder / "config.json").read_text())["dtype"] == case.source.dtype == "bfloat16"


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_tied_embeddings_stay_tied_and_are_stored_once(family: str, packed: Callable[[str], Packed]) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed(family).folder)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    with safe_open(packed(family).folder / "model.safetensors", framework="pt") as tensors:
        assert "lm_head.weight" not in tensors.keys()  # noqa: SIM118  not a dict


def test_the_folder_brings_plan_and_tokenizer(packed: Callable[[str], Packed]) -> None:
    case = packed("llama")
    assert Plan.loads((case.folder / "plan.json").read_text(encoding="utf-8")) == case.plan
    text = "The assert statement"
    expected = AutoTokenizer.from_pretrained(case.source.path)(text)["input_ids"]
    assert AutoTokenizer.from_pretrained(case.folder)(text)["input_ids"] == expected
    said = json.loads((case.folder / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "bitwright"
    assert said["layers"] == {name: fidelity.name for name, fidelity in case.plan.by_name.items()}


@pytest.mark.parametrize("imports", ["import quantizer, transformers", "import transformers, quantizer"])
def test_another_process_loads_it_whichever_package_comes_first(imports: str, packed: Callable[[str], Packed]) -> None:
    code = (
        f"{imports}; import sys, torch\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__)\n"
    )
    command = [sys.executable, "-c", code, str(packed("llama").folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["QuantizedLinear"]


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    code = "import quantizer, sys; print('quantizer' in sys.modules, 'torch' in sys.modules, 'transformers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["True", "False", "False"]


def _edited(folder: Path, to: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    edit(config["quantization_config"])
    (to / "config.json").write_text(json.dumps(config))
    return to


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_other_format_versions_are_refused(version: object, packed: Callable[[str], Packed], tmp_path: Path) -> None:
    folder = _edited(packed("llama").folder, tmp_path / "other", lambda said: said.update(version=version))
    with pytest.raises(CheckpointError, match="version"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_checkpoint_that_names_no_layers_is_refused(packed: Callable[[str], Packed], tmp_path: Path) -> None:
    folder = _edited(packed("llama").folder, tmp_path / "other", lambda said: said.update(layers={}))
    with pytest.raises(CheckpointError, match="no layers"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_checkpoint_without_the_field_layers_is_refused(packed: Callable[[str], Packed], tmp_path: Path) -> None:
    folder = _edited(packed("llama").folder, tmp_path / "other", lambda said: said.pop("layers"))
    with pytest.raises(CheckpointError, match="no layers"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_weight_that_is_stored_otherwise_than_planned_is_refused(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    plan, weights = _stored(model)
    other = Plan.uniform(plan.layers, MENU[0])
    with pytest.raises(CheckpointError, match=r"the plan says int3g32"):
        pack_model(model, other, weights)


def test_bytes_on_disk_that_contradict_the_plan_are_refused(tiny_folder: TinyFolder, tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    plan, weights = _stored(model)
    pack_model(model, plan, weights)
    other = Plan.uniform(plan.layers, MENU[0])
    with pytest.raises(CheckpointError, match=f"{plan.weight_bytes}.*{other.weight_bytes}"):
        save_checkpoint(model, tiny_folder("llama"), other, tmp_path / "out")


def test_a_folder_that_exists_is_not_written_to(tiny_folder: TinyFolder, tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    plan, weights = _stored(model)
    pack_model(model, plan, weights)
    with pytest.raises(FileExistsError):
        save_checkpoint(model, tiny_folder("llama"), plan, tmp_path)
    assert not list(tmp_path.iterdir())
