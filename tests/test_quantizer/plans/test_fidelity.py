"""Promises of quantizer.plans.fidelity.

Names, what is refused, how columns are split, what a layer costs.
"""

import subprocess
import sys
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantizer.errors import FidelityError
from quantizer.plans.fidelity import (
    CODE_BITS,
    COLUMN_MULTIPLE,
    Fidelity,
    permutation_bytes,
    word_count,
)
from tests.support.paths import ROOT
from tests.support.quantized import few, fidelities, fixed, random_weight, stored_bytes

SPLIT = Fidelity(2, 4, 0.125, 64)


@fixed
@given(fidelities())
def test_parse_reads_every_name_back(fidelity: Fidelity) -> None:
    assert Fidelity.parse(fidelity.name) == fidelity


@pytest.mark.parametrize("ratio", [0.000001, 0.00001, 0.000099])
def test_parse_reads_names_of_very_small_ratios_back(ratio: float) -> None:
    fidelity = Fidelity(2, 4, ratio, 64)
    assert Fidelity.parse(fidelity.name) == fidelity


@pytest.mark.parametrize(
    ("name", "fidelity"),
    [
        ("int3g64", Fidelity(3, 3, 0.0, 64)),
        ("int8g32", Fidelity.uniform(8, 32)),
        ("int2+4r0.125g64", SPLIT),
        ("int2+4r.125g64", SPLIT),
        ("int2+4r0.1250g64", SPLIT),
        ("int2g128s8", Fidelity(2, 2, 0.0, 128, 8)),
        ("int2g128s16", Fidelity.uniform(2, 128)),
        ("int2g128o0.005", Fidelity(2, 2, 0.0, 128, 16, 0.005)),
        ("int2g128a16", Fidelity(2, 2, 0.0, 128, adapter_rank=16)),
        ("int3g64s6a256", Fidelity(3, 3, 0.0, 64, scale_bits=6, adapter_rank=256)),
        ("int2+4r0.0625g128s8o0.005a16", Fidelity(2, 4, 0.0625, 128, 8, 0.005, 16)),
    ],
)
def test_names_mean_what_they_say(name: str, fidelity: Fidelity) -> None:
    assert Fidelity.parse(name) == fidelity


@pytest.mark.parametrize(
    "name",
    [
        "int2g128",
        "int2+4r0.125g64",
        "int2g128s8",
        "int2g128o0.000001",
        "int2g128a1",
        "int2+4r0.0625g128s6o0.005a16",
    ],
)
def test_names_say_what_they_mean(name: str) -> None:
    assert Fidelity.parse(name).name == name


def test_ratios_that_print_alike_are_equal() -> None:
    assert Fidelity(2, 4, 0.1250000001, 64) == SPLIT
    assert hash(Fidelity(2, 4, 0.1250000001, 64)) == hash(SPLIT)
    assert Fidelity(2, 4, 0.125, 64, 16, 0.0050000001) == Fidelity(2, 4, 0.125, 64, 16, 0.005)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "int",
        "int3",
        "g64",
        "INT3g64",
        "int3g",
        "int3g64 ",
        " int3g64",
        "int33g64",
        "int2+4g64",
        "int2r0.5g64",
        "q4_0",
    ],
)
def test_other_spellings_are_refused_with_an_example(name: str) -> None:
    with pytest.raises(FidelityError, match="write int3g64"):
        Fidelity.parse(name)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "int2g64a16s8",
            "int2g64o0.005s8",
            "int2g64a4o0.005",
            "int2g64s8s8",
            "int2g64s",
            "int2g64o",
            "int2g64a",
            "int2g64S8",
        ),
        *(
            "int2s8g64",
            "int2g64o5e-3",
            "int2g64o1",
            "int2g64s-8",
            "int2g64 s8",
            "int2g64a1.5",
            "int2g64s8_a16",
        ),
    ],
)
def test_options_in_another_form_are_refused_with_their_order(name: str) -> None:
    with pytest.raises(FidelityError, match=r"options follow in the order s8, o0\.005, a16"):
        Fidelity.parse(name)


@pytest.mark.parametrize(
    "name",
    [
        "int3g64\n",
        "int3g\u0666\u0664",
        "int3g64s\u0668",
        "int3g" + "6" * 5000,
        "int3g64a" + "1" * 5000,
    ],
)
def test_names_are_plain_and_whole(name: str) -> None:
    with pytest.raises(FidelityError):
        Fidelity.parse(name)


@pytest.mark.parametrize("bits", [-1, 0, 1, 5, 6, 7, 9, 16])
def test_widths_that_are_not_stored_are_refused(bits: int) -> None:
    with pytest.raises(FidelityError, match="use widths out of"):
        Fidelity.uniform(bits, 64)
    with pytest.raises(FidelityError, match="use widths out of"):
        Fidelity(2, bits, 0.5, 64)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, 0.9999999, float("nan"), float("inf")])
def test_ratios_outside_the_unit_interval_are_refused(ratio: float) -> None:
    with pytest.raises(FidelityError, match="use 0 <= ratio < 1"):
        Fidelity(2, 4, ratio, 64)


@pytest.mark.parametrize("group_size", [-32, 0, 1, 31, 33, 48])
def test_group_sizes_that_are_not_whole_steps_are_refused(group_size: int) -> None:
    with pytest.raises(FidelityError, match="multiple of 32"):
        Fidelity.uniform(4, group_size)


@pytest.mark.parametrize("bits", [-8, 0, 1, 4, 5, 7, 10, 32])
def test_scale_widths_that_are_not_stored_are_refused(bits: int) -> None:
    with pytest.raises(FidelityError, match=r"use a width out of \(16, 8, 6\)"):
        Fidelity(2, 2, 0.0, 64, scale_bits=bits)


@pytest.mark.parametrize(
    "share", [-0.1, -1e-9, 1e-7, 0.1, 0.0999999, 0.5, 1.0, float("nan"), float("inf")]
)
def test_outlier_shares_that_cannot_be_named_or_do_not_pay_are_refused(share: float) -> None:
    with pytest.raises(FidelityError, match=r"use 0 for none, or 0\.000001 <= share < 0\.1"):
        Fidelity(2, 2, 0.0, 64, outlier_share=share)


@pytest.mark.parametrize("rank", [-1, 257, 10**8])
def test_ranks_out_of_range_are_refused(rank: int) -> None:
    with pytest.raises(FidelityError, match="at most 256"):
        Fidelity(2, 2, 0.0, 64, adapter_rank=rank)


@pytest.mark.parametrize(
    ("low", "high", "ratio"), [(4, 2, 0.5), (4, 4, 0.5), (2, 4, 0.0), (2, 4, 1e-9)]
)
def test_contradictory_splits_are_refused(low: int, high: int, ratio: float) -> None:
    with pytest.raises(FidelityError):
        Fidelity(low, high, ratio, 64)


@fixed
@given(fidelities(), st.integers(1, 5000))
def test_high_columns_are_whole_steps_near_the_share_and_leave_a_low_column(
    fidelity: Fidelity, in_features: int
) -> None:
    high = fidelity.high_columns(in_features)
    assert high % COLUMN_MULTIPLE == 0
    assert 0 <= high < in_features
    if fidelity.ratio == 0 or in_features <= COLUMN_MULTIPLE:
        assert high == 0
        return
    largest = (in_features - 1) // COLUMN_MULTIPLE * COLUMN_MULTIPLE
    assert high >= COLUMN_MULTIPLE
    share = Fraction(fidelity.ratio) * in_features
    if COLUMN_MULTIPLE <= share <= largest:
        assert abs(share - high) <= Fraction(COLUMN_MULTIPLE, 2) + Fraction(1, 10**6)


@pytest.mark.parametrize(
    ("ratio", "in_features", "high"),
    [
        (0.125, 4096, 512),
        (0.125, 100, 32),
        (0.01, 4096, 32),
        (0.99, 64, 32),
        (0.99, 65, 64),
        (0.99, 4096, 4064),
        (0.5, 32, 0),
        (0.5, 33, 32),
    ],
)
def test_high_columns_of_known_layers(ratio: float, in_features: int, high: int) -> None:
    assert Fidelity(2, 4, ratio, 64).high_columns(in_features) == high


@fixed
@given(fidelities(), st.integers(1, 5000))
def test_parts_cover_the_columns_once_high_part_first(fidelity: Fidelity, in_features: int) -> None:
    parts = fidelity.parts(in_features)
    assert sum(columns for columns, _ in parts) == in_features
    assert all(columns > 0 for columns, _ in parts)
    high = fidelity.high_columns(in_features)
    expected = [(high, fidelity.bits_hi)] * bool(high) + [(in_features - high, fidelity.bits_lo)]
    assert list(parts) == expected


@few
@given(fidelities(), st.integers(1, 70), st.integers(1, 300), st.integers(0, 2**32))
def test_bytes_of_stored_tensors_equal_the_fidelitys_count(
    fidelity: Fidelity, out: int, columns: int, seed: int
) -> None:
    weight = random_weight(fidelity, out, columns, seed)
    assert fidelity.weight_bytes(out, columns) == weight.weight_bytes == stored_bytes(weight)


@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize("in_features", [1, 31, 33, 100, 545])
@pytest.mark.parametrize("out_features", [1, 7, 33])
def test_bytes_are_exact_for_awkward_shapes(bits: int, in_features: int, out_features: int) -> None:
    for fidelity in (
        Fidelity.uniform(bits, 64),
        Fidelity(2, 8, 0.001, 32),
        Fidelity(3, 4, 0.999, 256),
    ):
        assert fidelity.weight_bytes(out_features, in_features) == stored_bytes(
            random_weight(fidelity, out_features, in_features)
        )


@pytest.mark.parametrize("in_features", [2**16, 2**16 + 1])
def test_bytes_are_exact_where_the_permutation_grows_to_four_bytes(in_features: int) -> None:
    for fidelity in (Fidelity(2, 4, 0.25, 128), Fidelity(2, 4, 0.25, 128, outlier_share=0.01)):
        assert fidelity.weight_bytes(1, in_features) == stored_bytes(
            random_weight(fidelity, 1, in_features)
        )
    assert permutation_bytes(in_features) == in_features * (2 if in_features == 2**16 else 4)


def test_bytes_of_a_known_layer_follow_by_hand() -> None:
    # 64 columns at 4 bits and 36 at 2 bits, groups of 32: 2 + 2 groups; 7 rows
    codes = 4 * 7 * (8 + 3)
    scales = 2 * 7 * (2 + 2)
    zeros = 4 * (2 * 1 + 2 * 1)
    assert Fidelity(2, 4, 0.64, 32).weight_bytes(7, 100) == codes + scales + zeros + 2 * 100


def test_bytes_of_options_follow_by_hand() -> None:
    plain = Fidelity(2, 4, 0.64, 32)  # 2 + 2 groups, 7 rows, 100 columns
    before = plain.weight_bytes(7, 100)
    for bits, in_words in ((8, 2), (6, 2)):
        assert (
            replace(plain, scale_bits=bits).weight_bytes(7, 100)
            == before - 2 * 7 * 4 + 4 * in_words * 4 + 2 * 7
        )
    assert replace(plain, outlier_share=0.02).weight_bytes(7, 100) == before + 14 * (2 + 2) + 4 * 8
    assert replace(plain, adapter_rank=3).weight_bytes(7, 100) == before + 2 * 3 * (100 + 7)


@pytest.mark.parametrize(
    ("share", "shape", "count"),
    [
        (0.0, (7, 100), 0),
        (0.000001, (1, 1), 1),
        (0.01, (7, 100), 7),
        (0.0992, (5, 5), 2),
        (0.06, (5, 5), 2),
    ],
)
def test_outliers_are_the_share_of_all_weights_but_at_least_one(
    share: float, shape: tuple[int, int], count: int
) -> None:
    assert Fidelity(2, 2, 0.0, 64, outlier_share=share).outlier_count(*shape) == count


@pytest.mark.parametrize(
    ("rank", "shape", "width"),
    [(0, (7, 100), 0), (3, (7, 100), 3), (256, (7, 100), 7), (256, (100, 64), 64)],
)
def test_an_adapter_is_no_wider_than_its_layer(
    rank: int, shape: tuple[int, int], width: int
) -> None:
    assert Fidelity(2, 2, 0.0, 64, adapter_rank=rank).stored_adapter_rank(*shape) == width


@fixed
@given(st.integers(0, 5000), st.integers(1, 8))
def test_words_are_the_fewest_that_hold_the_codes(values: int, bits: int) -> None:
    count = word_count(values, bits)
    assert 32 * (count - 1) < values * bits <= 32 * count


def test_byte_counts_need_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; from quantizer.plans.plan import Plan; "
        "from quantizer.plans.fidelity import Fidelity; "
        "print(Fidelity.uniform(4, 64).weight_bytes(64, 64), 'torch' in sys.modules, 'numpy' in "
        "sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    expected = Fidelity.uniform(4, 64).weight_bytes(64, 64)
    assert result.stdout.split() == [str(expected), "False", "False"]
