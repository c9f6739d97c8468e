"""Promises about the options of a fidelity from a layer to a checkpoint.

Quantized, saved, loaded, to the bit and to the byte.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantizer.conversion.checkpoint import quantized_bytes, save_checkpoint
from quantizer.conversion.pack import pack_model
from quantizer.errors import CheckpointError
from quantizer.modules.linear import QuantizedLinear, get_linear
from quantizer.packed.layout import named_parts
from quantizer.packed.scales import scale_unit
from quantizer.packed.weight import QuantizedWeight
from quantizer.plans.fidelity import Fidelity
from quantizer.plans.plan import Plan
from quantizer.rounding.columns import column_impact
from quantizer.rounding.gptq import gptq_layer
from quantizer.structure.blocks import find_layers
from tests.support.edited_models import tensors
from tests.support.quantized import (
    OPTION_NAMES,
    TinyFolder,
    TinyModel,
    correlated_inputs,
    logits_of,
    normal,
    stored_bytes,
)
from tests.support.quantized import PACKED_TOKENS as TOKENS
from tests.support.slow_references import dequantize_slowly, outliers_slowly, scales_slowly

options = pytest.mark.parametrize(
    "fidelity", [Fidelity.parse(name) for name in OPTION_NAMES], ids=lambda fidelity: fidelity.name
)


@cache
def _hessian(features: int) -> Tensor:
    inputs = correlated_inputs(4 * features, features)
    return inputs.t() @ inputs / len(inputs)


def _quantize(weight: Tensor, fidelity: Fidelity, scores: Tensor | None = None) -> QuantizedWeight:
    hessian = _hessian(weight.shape[1])
    impact = column_impact(weight, hessian, fidelity.bits_lo, fidelity.group_size)
    return gptq_layer(weight, hessian, fidelity, impact, scores)


def _loss(weight: Tensor, stored: QuantizedWeight) -> float:
    error = (weight - stored.dequantize()).double()
    return float(((error @ _hessian(weight.shape[1]).double()) * error).sum())


@options
def test_a_quantized_layer_is_what_its_tensors_say_and_weighs_what_its_fidelity_says(
    fidelity: Fidelity,
) -> None:
    stored = _quantize(normal(9, 100), fidelity)
    assert stored.fidelity == fidelity
    assert fidelity.weight_bytes(9, 100) == stored.weight_bytes == stored_bytes(stored)
    without = replace(fidelity, adapter_rank=0)
    dense = QuantizedWeight(
        without,
        9,
        100,
        {name: kept for name, kept in stored.tensors.items() if "adapter" not in name},
    )
    assert dense.dequantize().tolist() == dequantize_slowly(dense)
    assert torch.allclose(
        stored.dequantize(), torch.tensor(dequantize_slowly(stored)), rtol=1e-5, atol=1e-6
    )


@options
def test_each_scale_has_a_code_that_is_not_zero(fidelity: Fidelity) -> None:
    stored = _quantize(normal(9, 100), fidelity)
    for name, _, bits in named_parts(fidelity, 100):
        scales = torch.tensor(scales_slowly(stored, name, bits))
        assert bool((scales > 0).all())
        if fidelity.scale_bits < 16:
            codes = scales / scale_unit(stored.tensors["row_scales"].float(), fidelity, bits)
            assert 1 <= float(codes.min()) <= float(codes.max()) < 2**fidelity.scale_bits


def test_an_adapter_is_added_to_the_layer_without_one() -> None:
    weight = normal(24, 100)
    for name in ("int2g32", "int2+4r0.4g32s8o0.005"):
        without, stored = (
            _quantize(weight, Fidelity.parse(name)),
            _quantize(weight, Fidelity.parse(f"{name}a4")),
        )
        assert all(
            torch.equal(stored.tensors[key], tensor) for key, tensor in without.tensors.items()
        )
        lower = torch.linalg.cholesky(_hessian(100).double())
        singular = torch.linalg.svdvals((weight - without.dequantize()).double() @ lower)
        assert _loss(weight, stored) == pytest.approx(float(singular[4:].square().sum()), rel=1e-3)


def test_outliers_stand_in_the_place_of_an_exact_zero() -> None:
    stored = _quantize(normal(24, 100), Fidelity.parse("int2+4r0.4g32s6o0.02"))
    plain = replace(stored.fidelity, outlier_share=0)
    dense = QuantizedWeight(
        plain,
        24,
        100,
        {name: kept for name, kept in stored.tensors.items() if "outlier" not in name},
    )
    places, whole = outliers_slowly(stored), stored.dequantize()
    assert len(places) == 48
    for place, value in places.items():
        assert float(dense.dequantize()[place]) == 0
        assert float(whole[place]) == value
    rest = torch.ones(24, 100, dtype=torch.bool)
    rest[tuple(zip(*places, strict=True))] = False
    assert torch.equal(whole[rest], dense.dequantize()[rest])


def test_outliers_are_where_the_scores_are_highest() -> None:
    weight, scores = normal(24, 100), normal(24, 100, seed=9)
    by_moment = _hessian(100).diagonal() * weight.square()
    for given, expected in ((scores, scores), (None, by_moment)):
        places = outliers_slowly(_quantize(weight, Fidelity.parse("int2+4r0.4g32o0.02"), given))
        highest = expected.flatten().topk(48).indices.tolist()
        assert sorted(places) == sorted((at // 100, at % 100) for at in highest)


def test_the_first_column_s_outliers_are_the_weights_themselves() -> None:
    weight, fidelity = normal(24, 100), Fidelity.parse("int2g32o0.01")
    first = int(_quantize(weight, fidelity).tensors["columns"][0])
    scores = torch.zeros(24, 100)
    scores[:, first] = 1
    places = outliers_slowly(_quantize(weight, fidelity, scores))
    assert places == {(out, first): float(weight[out, first].half()) for out in range(24)}


def test_large_weights_widen_neither_ranges_nor_row_scales() -> None:
    weight = normal(24, 100)
    weight[torch.arange(24), torch.arange(24)] += 30
    with_outliers = _loss(weight, _quantize(weight, Fidelity.parse("int2g32o0.01")))
    assert with_outliers < 0.2 * _loss(weight, _quantize(weight, Fidelity.uniform(2, 32)))
    assert _loss(weight, _quantize(weight, Fidelity.parse("int2g32s6o0.01"))) < 1.1 * with_outliers


@pytest.mark.parametrize("name", ["int2g64s6", "int2g32s8", "int2+4r0.4g32s8", "int4g32s6"])
def test_coded_scales_have_room_for_what_groups_absorb(name: str) -> None:
    weight, fidelity = normal(48, 128), Fidelity.parse(name)
    assert _loss(weight, _quantize(weight, fidelity)) < 1.1 * _loss(
        weight, _quantize(weight, replace(fidelity, scale_bits=16))
    )


@options
def test_arguments_are_left_alone(fidelity: Fidelity) -> None:
    weight, scores = normal(9, 100), normal(9, 100, seed=3)
    before = weight.clone(), scores.clone(), _hessian(100).clone()
    _quantize(weight, fidelity, scores)
    assert all(map(torch.equal, (weight, scores, _hessian(100)), before))


@options
def test_a_layer_that_saw_no_input_and_one_of_zeros_are_stored(fidelity: Fidelity) -> None:
    stored = gptq_layer(normal(9, 100), torch.zeros(100, 100), fidelity, torch.zeros(100))
    assert float((stored.dequantize() - normal(9, 100)).abs().mean()) < 0.5
    assert (
        not gptq_layer(torch.zeros(9, 100), torch.eye(100), fidelity, torch.zeros(100))
        .dequantize()
        .any()
    )


def test_scores_of_another_layer_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(100, 9\) for a weight of shape \(9, 100\)"):
        _quantize(normal(9, 100), Fidelity.parse("int2g32o0.01"), normal(100, 9))


def _packed(model: torch.nn.Module, fidelity: Fidelity) -> tuple[Plan, dict[str, QuantizedWeight]]:
    plan = Plan.uniform(find_layers(model), fidelity)
    return plan, {
        layer.name: _quantize(get_linear(model, layer.name).weight.data, fidelity)
        for layer in plan.layers
    }


@options
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_transformers_loads_what_was_saved_bit_for_bit(
    family: str,
    fidelity: Fidelity,
    tiny_folder: TinyFolder,
    tiny_model: TinyModel,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    model, folder = tiny_model(family), tmp_path_factory.mktemp("saved") / "out"
    plan, weights = _packed(model, fidelity)
    pack_model(model, plan, weights)
    save_checkpoint(model, tiny_folder(family), plan, folder)
    assert (
        quantized_bytes(folder, plan)
        == plan.weight_bytes
        == sum(map(stored_bytes, weights.values()))
    )
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for name, weight in weights.items():
        module = loaded.get_submodule(name)
        assert isinstance(module, QuantizedLinear)
        assert module.fidelity == fidelity
        buffers = dict(module.named_buffers())
        assert set(buffers) == set(weight.tensors)
        for key, tensor in weight.tensors.items():
            assert buffers[key].dtype == tensor.dtype
            assert torch.equal(buffers[key], tensor)
    original, loaded = (
        tiny_model(family),
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
    )
    for name, weight in weights.items():
        original.get_submodule(name).weight.data = weight.dequantize()
    assert torch.equal(logits_of(loaded, TOKENS), logits_of(original, TOKENS))


def test_a_checkpoint_that_lacks_an_option_s_tensor_is_refused(
    tiny_folder: TinyFolder, tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = tiny_model("llama")
    plan, weights = _packed(model, Fidelity.parse("int2+4r0.4g32s8o0.005a16"))
    pack_model(model, plan, weights)
    for leaf in ("low_scale_codes", "row_scales", "outlier_starts", "adapter_b"):
        folder = tmp_path_factory.mktemp("saved") / "out"
        save_checkpoint(model, tiny_folder("llama"), plan, folder)
        tensors(lambda all_, leaf=leaf: all_.pop(f"model.layers.0.mlp.up_proj.{leaf}"))(folder)
        with pytest.raises(
            CheckpointError, match=f"lacks 1 packed tensors, 'model.layers.0.mlp.up_proj.{leaf}'"
        ):
            AutoModelForCausalLM.from_pretrained(folder)
