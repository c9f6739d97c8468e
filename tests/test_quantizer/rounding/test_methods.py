"""Promises of quantizer.rounding.methods.

The methods differ as documented, and unknown ones are refused.
"""

import pytest
import torch
from torch import Tensor

from quantizer.errors import RoundingError
from quantizer.plans.fidelity import Fidelity
from quantizer.rounding.columns import column_impact, sparsity_impact
from quantizer.rounding.gptq import gptq_layer
from quantizer.rounding.grids import round_to_nearest
from quantizer.rounding.methods import METHODS, SELECTIONS, LayerScores, Rounding, quantize_layer
from tests.support.quantized import correlated_inputs, normal

SPLIT = Fidelity(2, 4, 0.4, 32)


def _problem(features: int = 96) -> tuple[Tensor, Tensor]:
    inputs = correlated_inputs(300, features)
    return normal(24, features, seed=1), inputs.t() @ inputs / 300


def _output_error(weight: Tensor, hessian: Tensor, found: Tensor) -> float:
    error = found - weight
    return float(((error @ hessian) * error).sum())


def test_the_default_is_error_compensation_on_the_columns_of_largest_output_error() -> None:
    weight, hessian = _problem()
    impact = column_impact(weight, hessian, 2, 32)
    expected = gptq_layer(weight, hessian, SPLIT, impact)
    found = quantize_layer(weight, hessian, SPLIT)
    assert all(tensor.equal(expected.tensors[name]) for name, tensor in found.tensors.items())
    assert Rounding().name == "gptq/hessian"


def test_compensation_beats_rounding_and_rounding_is_that_of_its_grid() -> None:
    weight, hessian = _problem()
    found = {
        method: quantize_layer(
            weight, hessian, Fidelity.uniform(3, 32), Rounding(method)
        ).dequantize()
        for method in METHODS
    }
    errors = {method: _output_error(weight, hessian, each) for method, each in found.items()}
    assert errors["gptq"] < 0.8 * errors["rtn"]
    columns = (
        quantize_layer(weight, hessian, Fidelity.uniform(3, 32), Rounding("rtn"))
        .tensors["columns"]
        .long()
    )
    expected = round_to_nearest(weight[:, columns], 3, 32, hessian.diagonal()[columns])
    assert found["rtn"][:, columns].allclose(expected, atol=1e-6)


def test_where_inputs_do_not_depend_on_each_other_compensation_is_rounding() -> None:
    weight, hessian = normal(24, 96, seed=1), torch.eye(96)
    plain, compensated = (
        quantize_layer(weight, hessian, SPLIT, Rounding(method)) for method in ("rtn", "gptq")
    )
    assert plain.dequantize().equal(compensated.dequantize())


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_saw_no_input_is_rounded(method: str) -> None:
    weight = normal(24, 96, seed=1)
    found = quantize_layer(
        weight, torch.zeros(96, 96), Fidelity.uniform(4, 32), Rounding(method)
    ).dequantize()
    assert (found - weight).square().mean() < 0.02


@pytest.mark.parametrize("method", METHODS)
def test_high_columns_are_those_of_the_selection(method: str) -> None:
    weight, hessian = _problem()
    given = normal(96, seed=9)
    scores = {
        "hessian": column_impact(weight, hessian, 2, 32),
        "sparsity": sparsity_impact(weight, hessian),
        "given": given,
    }
    high = {}
    for selection in SELECTIONS:
        quantized = quantize_layer(
            weight, hessian, SPLIT, Rounding(method, selection), LayerScores(given)
        )
        high[selection] = set(
            quantized.tensors["columns"].long()[: SPLIT.high_columns(96)].tolist()
        )
        if selection in scores:
            assert high[selection] == set(
                scores[selection].argsort(descending=True)[: SPLIT.high_columns(96)].tolist()
            )
    again = (
        quantize_layer(weight, hessian, SPLIT, Rounding(method, "random")).tensors["columns"].long()
    )
    assert high["random"] == set(again[: SPLIT.high_columns(96)].tolist())
    assert len({frozenset(each) for each in high.values()}) == len(SELECTIONS)


def test_unknown_methods_and_missing_scores_are_refused() -> None:
    weight, hessian = _problem()
    with pytest.raises(RoundingError, match="'awq' does not exist; use one of gptq, rtn"):
        Rounding("awq")
    with pytest.raises(RoundingError, match="'luck'"):
        Rounding("rtn", "luck")
    with pytest.raises(RoundingError, match="give one for each of 96 columns"):
        quantize_layer(weight, hessian, SPLIT, Rounding(selection="given"))
    with pytest.raises(RoundingError, match="give one for each of 96 columns"):
        quantize_layer(
            weight, hessian, SPLIT, Rounding(selection="given"), LayerScores(torch.ones(95))
        )
    with pytest.raises(RoundingError, match="rtn cannot store int2g32s8: use gptq, or int2g32"):
        quantize_layer(weight, hessian, Fidelity.parse("int2g32s8"), Rounding("rtn"))
