"""Promises of checkpoints of mixtures of experts and of models with transposed layers."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from quantizer.conversion.checkpoint import read_weights, save_checkpoint
from quantizer.conversion.pack import pack_model
from quantizer.models.loading import load_model, meta_model
from quantizer.models.source import find_model
from quantizer.modules.linear import QuantizedLinear, set_dequantized_weight
from quantizer.packed.weight import QuantizedWeight
from quantizer.plans.fidelity import Fidelity
from quantizer.plans.plan import Plan
from quantizer.rounding.methods import quantize_layer
from quantizer.structure.blocks import find_layers
from tests.support.mixtures import MIXTURES, TRANSPOSED, save_mixture
from tests.support.quantized import PACKED_TOKENS as TOKENS
from tests.support.quantized import logits_of

CaseOf = Callable[[str], "Case"]

families = pytest.mark.parametrize("family", [*MIXTURES, *TRANSPOSED])

_FIDELITIES = (Fidelity.parse("int3g32s6"), Fidelity.parse("int2+4r0.5g32s6"))


@dataclass(frozen=True)
class Case:
    """A checkpoint, its original, and what it must compute."""

    folder: Path
    original: Path
    plan: Plan
    weights: dict[str, QuantizedWeight]
    expected: torch.Tensor


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> CaseOf:
    """Makes the checkpoint of a family, once; no test writes to it."""
    return cache(lambda family: make(family, tmp_path_factory.mktemp(family)))


def make(family: str, folder: Path) -> Case:
    original = save_mixture(family, folder / "original")
    source = find_model(str(original), folder / "cache")
    model = load_model(source, torch.float32, "cpu")
    layers = find_layers(model)
    fidelities = tuple(_FIDELITIES[at % 2] for at in range(len(layers)))
    plan = Plan(layers, fidelities)
    weights = {}
    for layer, fidelity in zip(layers, fidelities, strict=True):
        weight = model.get_submodule(layer.name).weight.float()
        weights[layer.name] = quantize_layer(weight, torch.eye(layer.in_features), fidelity)
        set_dequantized_weight(model, layer.name, weights[layer.name])
    expected = logits_of(model, TOKENS)
    pack_model(model, plan, weights)
    save_checkpoint(model, source, plan, folder / "out")
    return Case(folder / "out", original, plan, weights, expected)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118


@families
def test_a_saved_mixture_computes_what_its_dequantized_weights_do(
    family: str, case_of: CaseOf
) -> None:
    case = case_of(family)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        case.folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    found = logits_of(loaded, TOKENS)
    assert torch.allclose(found, case.expected, atol=1e-4, rtol=0)
    best = case.expected.topk(2, dim=-1)
    clear = best.values[..., 0] - best.values[..., 1] > 2e-4
    assert torch.equal(found.argmax(-1)[clear], best.indices[..., 0][clear])


@families
def test_packed_experts_take_little_more_than_their_bytes(family: str, case_of: CaseOf) -> None:
    case = case_of(family)
    loaded: Any = AutoModelForCausalLM.from_pretrained(case.folder, dtype=torch.float32)
    held = 0
    for module in loaded.modules():
        if isinstance(module, QuantizedLinear):
            held += sum(buffer.nbytes for buffer in module.buffers())
            assert module.weight is None
    assert held <= 1.3 * case.plan.weight_bytes


@families
def test_a_checkpoint_keeps_the_names_and_tensors_of_the_original(
    family: str, case_of: CaseOf
) -> None:
    case = case_of(family)
    before, after = tensors_of(case.original), tensors_of(case.folder)
    config = json.loads((case.folder / "config.json").read_text(encoding="utf-8"))
    stored = config["quantization_config"]["layers"]
    prefixes = {name.rpartition(".")[0] for name in after}
    assert set(stored) <= prefixes
    whole = {name for name in before if name.removesuffix(".weight") in stored}
    for name in before.keys() & after.keys():
        if name.rpartition(".")[0] not in stored:
            assert torch.equal(before[name], after[name])
    left_out = before.keys() - after.keys() - whole
    if family in {"mixtral", "qwen3_moe", "deepseek_v3", "gpt2"}:
        assert not left_out
        assert len(whole) == len(stored)
    else:  # the files hold all experts of a layer in one tensor
        assert left_out
        assert all(before[name].ndim >= 2 for name in left_out)


@families
def test_packed_tensors_are_read_back(family: str, case_of: CaseOf) -> None:
    case = case_of(family)
    read = read_weights(case.folder, case.plan)
    for name, weight in case.weights.items():
        assert torch.equal(read[name].dequantize(), weight.dequantize())


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_what_was_loaded_can_be_saved_and_loaded_again(
    family: str, case_of: CaseOf, tmp_path: Path
) -> None:
    case = case_of(family)
    loaded = AutoModelForCausalLM.from_pretrained(case.folder, dtype=torch.float32)
    loaded.save_pretrained(tmp_path / "again")
    assert tensors_of(tmp_path / "again").keys() == tensors_of(case.folder).keys()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(logits_of(again, TOKENS), logits_of(loaded, TOKENS))


def test_the_structure_is_known_without_weights(tmp_path: Path) -> None:
    folder = save_mixture("qwen3_moe", tmp_path / "original")
    source = find_model(str(folder), tmp_path / "cache", read_weights=False)
    loaded = load_model(source, torch.float32, "cpu")
    assert find_layers(meta_model(source)) == find_layers(loaded)
