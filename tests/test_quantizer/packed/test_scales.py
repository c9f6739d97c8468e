"""Promises of quantizer.packed.scales.

Coded scales are the nearest that can be said, exact, and wide enough for every group.
"""

from functools import partial

import numpy as np
import pytest
import torch

from quantizer.packed.scales import quantize_scale, scale_codes, scale_unit
from quantizer.plans.fidelity import Fidelity
from quantizer.rounding.grids import fit_grid
from quantizer.rounding.row_scales import HEADROOM, _float16_above, fit_row_scale
from tests.support.quantized import normal

WIDTHS = (6, 8)
NAMES = ("int2g32s6", "int3g64s8", "int8g32s8", "int2+4r0.3g32s6", "int4+8r0.5g64s8")


def _units(rows: int) -> torch.Tensor:
    return normal(rows, 1, seed=2).abs().add(1e-4).half().float()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("size", [0.0, 0.3, 1.0, 20.0, 100.0, 1000.0])
def test_coded_scales_are_the_nearest_that_have_a_code(bits: int, size: float) -> None:
    unit = _units(9)
    scale = unit * normal(9, 20, seed=3).abs() * size
    coded = quantize_scale(scale, unit, bits)
    for row, own_unit, found in zip(
        scale.tolist(), unit[:, 0].tolist(), coded.tolist(), strict=True
    ):
        candidates = [own_unit * code for code in range(1, 2**bits)]
        for value, kept in zip(row, found, strict=True):
            assert kept in candidates
            assert abs(kept - value) <= min(abs(candidate - value) for candidate in candidates) * (
                1 + 1e-5
            )


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shift", range(7))
def test_every_code_survives_multiplication_by_any_half(bits: int, shift: int) -> None:
    patterns = torch.arange(1, 0x7C00, 7, dtype=torch.int16).view(
        torch.float16
    )  # positive halves, subnormal ones too
    codes = torch.arange(1, 2**bits).float().unsqueeze(1)
    unit = patterns.float() * 2.0**-shift
    assert torch.equal((unit * codes).double(), unit.double() * codes.double())
    assert torch.equal(scale_codes(unit * codes, unit), codes.expand(-1, len(unit)))


COARSE = tuple(1 - 0.05 * step for step in (0, 4, 8, 12))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [0.0, 1e-9, 1e-5, 1e-3, 1.0, 1e3, 1e9])
def test_row_scales_are_the_smallest_with_headroom_for_each_fitted_scale(
    name: str, size: float
) -> None:
    fidelity, importance = Fidelity.parse(name), normal(150, seed=1).square()
    weight = normal(11, 150) * normal(11, 1, seed=4).square() * size
    row_scale, top = fit_row_scale(weight, importance, fidelity), 2**fidelity.scale_bits - 1
    assert row_scale.shape == (11, 1)
    assert torch.equal(row_scale.half().float(), row_scale)
    needed, start = torch.zeros(11, 1), 0
    for count, bits in fidelity.parts(150):
        for at in range(start, start + count, fidelity.group_size):
            group = slice(at, min(at + fidelity.group_size, start + count))
            scale, _ = fit_grid(weight[:, group], bits, importance[group], shrinks=COARSE)
            needed = needed.maximum(scale * 2 ** (bits - fidelity.bits_lo))
        start += count
    needed *= HEADROOM
    below = np.nextafter(row_scale.half().numpy(), np.float16(0)).astype(np.float64)
    assert bool((row_scale.double() * top >= needed.double() * (1 - 1e-6)).all())
    assert bool((torch.from_numpy(below) * top < needed.double() * (1 + 1e-6)).all())


def test_halves_above_are_the_same_where_a_half_says_it_already() -> None:
    patterns = torch.arange(1, 0x7BFF, 13, dtype=torch.int16)
    halves, following = patterns.view(torch.float16), (patterns + 1).view(torch.float16)
    assert torch.equal(_float16_above(halves.float()), halves)
    assert torch.equal(_float16_above((halves.float() + following.float()) / 2), following)
    assert torch.equal(_float16_above(halves.float() * (1 + 2.0**-20)), following)


def test_the_unit_of_a_finer_part_is_smaller_by_the_difference_of_the_widths() -> None:
    fidelity, row_scale = Fidelity.parse("int2+8r0.3g32s6"), _units(5)
    assert torch.equal(scale_unit(row_scale, fidelity, 2), row_scale)
    assert torch.equal(scale_unit(row_scale, fidelity, 8), row_scale / 64)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("scale_bits", WIDTHS)
def test_the_range_search_finds_the_best_grid_that_can_be_stored(
    bits: int, scale_bits: int
) -> None:
    weight, importance, top = normal(8, 40, seed=bits), normal(40, seed=1).square(), 2**bits - 1
    unit = fit_row_scale(weight, importance, Fidelity(bits, bits, 0.0, 64, scale_bits))
    scale, zero = fit_grid(
        weight, bits, importance, partial(quantize_scale, unit=unit, scale_bits=scale_bits)
    )

    def error(row: int, own_scale: float, own_zero: float) -> float:
        total = 0.0
        for value, share in zip(weight[row].tolist(), importance.tolist(), strict=True):
            code = min(max(round(value / own_scale + own_zero), 0), top)
            total += share * (own_scale * (code - own_zero) - value) ** 2
        return total

    for row in range(8):
        low, high, own_unit = (
            min(float(weight[row].min()), 0),
            max(float(weight[row].max()), 0),
            float(unit[row]),
        )
        errors = []
        for step in range(13):
            shrink = 1 - 0.05 * step
            own_scale = own_unit * min(
                max(round((high - low) * shrink / top / own_unit), 1), 2**scale_bits - 1
            )
            errors.append(error(row, own_scale, min(max(round(-low * shrink / own_scale), 0), top)))
        assert error(row, float(scale[row]), float(zero[row])) == pytest.approx(
            min(errors), rel=1e-3
        )
        assert float(scale[row] / unit[row]) in range(1, 2**scale_bits)
