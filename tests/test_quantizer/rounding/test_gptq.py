"""Promises of quantizer.rounding.gptq.

Errors are compensated exactly as the method says, and never in vain.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from quantizer.kernels.path import KERNELS_VARIABLE, REFERENCE
from quantizer.packed.grid import round_scale_to_float16
from quantizer.packed.layout import named_parts
from quantizer.packed.packing import unpack
from quantizer.packed.scales import quantize_scale, scale_unit
from quantizer.packed.weight import QuantizedWeight
from quantizer.plans.fidelity import Fidelity
from quantizer.rounding.columns import column_impact, column_order
from quantizer.rounding.gptq import gptq_candidates, gptq_layer
from quantizer.rounding.grids import fit_grid, round_to_nearest
from quantizer.rounding.inverse import DAMPING
from tests.support.quantized import correlated_inputs, normal
from tests.support.slow_references import outliers_slowly, scales_slowly

CASES = [
    (Fidelity.uniform(2, 32), 64),
    (Fidelity.uniform(3, 64), 96),
    (Fidelity.uniform(4, 32), 70),
    (Fidelity.uniform(8, 128), 64),
    (Fidelity(2, 4, 0.25, 32), 100),
    (Fidelity(3, 8, 0.5, 64), 33),
    (Fidelity.parse("int2g32s6"), 100),
    (Fidelity.parse("int3+4r0.25g32s8"), 100),
    (Fidelity.parse("int2g32o0.05"), 100),
    (Fidelity.parse("int2+4r0.25g32s6o0.01"), 100),
]


@pytest.fixture(autouse=True, params=["auto", REFERENCE])
def _kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All promises hold for compiled loops and for those of PyTorch."""
    monkeypatch.setenv(KERNELS_VARIABLE, request.param)


def _hessian(features: int, seed: int = 0) -> Tensor:
    inputs = correlated_inputs(4 * features, features, seed)
    return inputs.t() @ inputs / len(inputs)


def _quantize(weight: Tensor, hessian: Tensor, fidelity: Fidelity) -> QuantizedWeight:
    return gptq_layer(
        weight,
        hessian,
        fidelity,
        column_impact(weight, hessian, fidelity.bits_lo, fidelity.group_size),
    )


def _output_error(weight: Tensor, stored: Tensor, hessian: Tensor) -> float:
    difference = (weight - stored).double()
    return float((difference @ hessian.double() * difference).sum())


def _representable(stored: QuantizedWeight, bits: int) -> Callable[[Tensor], Tensor]:
    if stored.fidelity.scale_bits == 16:
        return round_scale_to_float16
    unit = scale_unit(stored.tensors["row_scales"].float().unsqueeze(1), stored.fidelity, bits)
    return partial(quantize_scale, unit=unit, scale_bits=stored.fidelity.scale_bits)


def _compensate_slowly(
    weight: Tensor, hessian: Tensor, stored: QuantizedWeight
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Quantize by explicit optimal brain surgery in float64.

    The column order, the grids and the places of outliers are the stored ones. After each column
    the inverse Hessian of the columns that remain is computed anew.

    Returns:
        The dequantized weight; and for each group of columns the scales that are fitted to what
        has remained of it, and the stored ones.
    """
    order = stored.tensors["columns"].long()
    damped = hessian.double() + DAMPING * hessian.double().diagonal().mean() * torch.eye(
        len(hessian), dtype=torch.float64
    )
    damped = damped[order][:, order]
    remaining = weight.double()[:, order]
    position = 0
    kept = torch.zeros(weight.shape, dtype=torch.bool)
    for place in outliers_slowly(stored):
        kept[place] = True
    kept, scales = kept[:, order], []
    for name, count, bits in named_parts(stored.fidelity, stored.in_features):
        grids = torch.tensor(scales_slowly(stored, name, bits), dtype=torch.float64)
        zeros = unpack(stored.tensors[f"{name}_zeros"], bits, stored.out_features)
        for column in range(count):
            group = column // stored.fidelity.group_size
            scale, zero = grids[group], zeros[group].double()
            if column % stored.fidelity.group_size == 0:
                columns = slice(
                    position, position + min(stored.fidelity.group_size, count - column)
                )
                dense = remaining[:, columns].masked_fill(kept[:, columns], 0).float()
                fitted, _ = fit_grid(
                    dense, bits, hessian.diagonal()[order][columns], _representable(stored, bits)
                )
                scales.append((fitted[:, 0].double(), scale))
            rounded = scale * (
                (remaining[:, position] / scale + zero).round().clamp(0, 2**bits - 1) - zero
            )
            rounded = torch.where(
                kept[:, position], remaining[:, position].half().double(), rounded
            )
            inverse = torch.linalg.inv(damped[position:, position:])
            step = (remaining[:, position] - rounded) / inverse[0, 0]
            remaining[:, position + 1 :] -= step[:, None] * inverse[0, 1:]
            remaining[:, position] = rounded
            position += 1
    dense = torch.empty_like(remaining)
    dense[:, order] = remaining
    return dense, scales


@pytest.mark.parametrize(("fidelity", "features"), CASES)
def test_gptq_is_explicit_optimal_brain_surgery(fidelity: Fidelity, features: int) -> None:
    weight, hessian = normal(12, features), _hessian(features)
    stored = _quantize(weight, hessian, fidelity)
    slow, scales = _compensate_slowly(weight, hessian, stored)
    # a weight on the border of two codes may fall either way, and what follows in its row with it
    agreeing = (stored.dequantize().double() - slow).abs().amax(1) < 1e-6
    assert int(agreeing.sum()) >= 11
    error = _output_error(weight, stored.dequantize(), hessian)
    assert error == pytest.approx(_output_error(weight, slow, hessian), rel=0.01)
    for fitted, kept in scales:
        assert int(torch.isclose(fitted, kept, rtol=2e-3).sum()) >= 11


def test_several_fidelities_of_many_outputs_are_what_each_is_alone() -> None:
    weight, hessian = normal(300, 100), _hessian(100)
    fidelities = [Fidelity.parse(name) for name in ("int2g32", "int2+4r0.25g32s6", "int8g64")]
    impacts = [column_impact(weight, hessian, each.bits_lo, each.group_size) for each in fidelities]
    for fidelity, together in zip(
        fidelities, gptq_candidates(weight, hessian, fidelities, impacts), strict=True
    ):
        error = torch.stack(
            [together.dequantize(), _quantize(weight, hessian, fidelity).dequantize()]
        )
        assert (
            int((error[0] - error[1]).abs().amax(1).lt(1e-6).sum()) >= 290
        )  # products of another shape, borders between codes
        slow, _ = _compensate_slowly(weight, hessian, together)
        assert int((error[0].double() - slow).abs().amax(1).lt(1e-6).sum()) >= 280


@pytest.mark.parametrize(("fidelity", "features"), CASES)
def test_compensation_beats_round_to_nearest_on_correlated_inputs(
    fidelity: Fidelity, features: int
) -> None:
    weight, hessian = normal(24, features, seed=1), _hessian(features, seed=1)
    rounded = round_to_nearest(weight, fidelity.bits_lo, fidelity.group_size, hessian.diagonal())
    stored = _quantize(weight, hessian, fidelity).dequantize()
    assert _output_error(weight, stored, hessian) < 0.8 * _output_error(weight, rounded, hessian)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_uncorrelated_inputs_leave_nothing_to_compensate(bits: int) -> None:
    weight, fidelity = normal(9, 100), Fidelity.uniform(bits, 32)
    stored = _quantize(weight, torch.eye(100), fidelity)
    assert torch.equal(stored.dequantize(), round_to_nearest(weight, bits, 32, torch.ones(100)))


def test_a_diagonal_hessian_is_plain_rounding_in_the_order_of_the_moments() -> None:
    weight, moments = normal(9, 100), normal(100, seed=5).square()
    stored = _quantize(weight, moments.diag(), Fidelity.uniform(3, 32))
    order = moments.argsort(descending=True, stable=True)
    assert torch.equal(stored.tensors["columns"].long(), order)
    assert torch.equal(
        stored.dequantize()[:, order], round_to_nearest(weight[:, order], 3, 32, moments[order])
    )


@pytest.mark.parametrize("fidelity", [Fidelity.uniform(3, 32), Fidelity(2, 4, 0.25, 32)])
def test_a_layer_that_saw_no_input_is_plainly_rounded(fidelity: Fidelity) -> None:
    weight = normal(9, 100)
    impact = column_impact(weight, torch.zeros(100, 100), fidelity.bits_lo, fidelity.group_size)
    stored = gptq_layer(weight, torch.zeros(100, 100), fidelity, impact)
    start = 0
    for columns, bits in fidelity.parts(100):
        part = slice(start, start + columns)
        assert torch.equal(
            stored.dequantize()[:, part],
            round_to_nearest(weight[:, part], bits, 32, torch.ones(columns)),
        )
        start += columns


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    weight, hessian = normal(9, 64), _hessian(64)
    hessian[10], hessian[:, 10] = 0, 0
    stored = _quantize(weight, hessian, Fidelity.uniform(4, 32)).dequantize()
    assert bool(torch.isfinite(stored).all())
    assert float((stored - weight)[:, 10].abs().max()) < 1


def test_fewer_inputs_than_columns_are_enough() -> None:
    inputs = correlated_inputs(10, 64)
    hessian = inputs.t() @ inputs / 10
    weight = normal(9, 64)
    rounded = round_to_nearest(weight, 3, 32, hessian.diagonal())
    stored = _quantize(weight, hessian, Fidelity.uniform(3, 32)).dequantize()
    assert _output_error(weight, stored, hessian) < 0.2 * _output_error(weight, rounded, hessian)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_size_of_the_hessian_does_not_matter(factor: float) -> None:
    weight, hessian = normal(9, 64), _hessian(64)
    error = _output_error(
        weight, _quantize(weight, hessian, Fidelity.uniform(3, 32)).dequantize(), hessian
    )
    scaled = _output_error(
        weight, _quantize(weight, factor * hessian, Fidelity.uniform(3, 32)).dequantize(), hessian
    )
    assert scaled == pytest.approx(error, rel=0.05)


def test_gptq_leaves_its_arguments_alone() -> None:
    weight, hessian = normal(9, 64), _hessian(64)
    before = weight.clone(), hessian.clone()
    _quantize(weight, hessian, Fidelity(2, 4, 0.5, 32))
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_moments_that_are_not_finite_are_refused(value: float) -> None:
    hessian = _hessian(64)
    hessian[3, 5] = hessian[5, 3] = value
    for name in ("int3g32", "int3g32s6o0.01a4"):
        with pytest.raises(ValueError, match="not finite"):
            gptq_layer(normal(9, 64), hessian, Fidelity.parse(name), torch.ones(64))


def test_the_stored_order_is_the_column_order() -> None:
    weight, hessian = normal(9, 100), _hessian(100)
    fidelity = Fidelity(2, 4, 0.25, 32)
    impact = column_impact(weight, hessian, 2, 32)
    stored = gptq_layer(weight, hessian, fidelity, impact)
    assert torch.equal(
        stored.tensors["columns"].long(), column_order(impact, hessian.diagonal(), fidelity)
    )
