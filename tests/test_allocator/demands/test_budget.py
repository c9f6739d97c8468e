"""A budget is what its author wrote, in whole bytes and never more."""

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.demands.budget import Budget
from allocator.errors import AllocatorError, BudgetError
from quantizer.plans.plan import LayerSpec
from tests.support.synthetic_profiles import PROPERTY, make_layers

LAYERS = make_layers(4)
WEIGHTS = sum(layer.out_features * layer.in_features for layer in LAYERS)
BYTES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@pytest.mark.parametrize("unit", BYTES)
def test_every_unit_counts_its_bytes(unit: str) -> None:
    assert Budget.parse(f"3{unit}").weight_bytes(LAYERS) == 3 * BYTES[unit]


def test_bits_per_weight_count_the_weights_of_the_layers() -> None:
    assert Budget.parse("2.5bpw").weight_bytes(LAYERS) == WEIGHTS * 5 // 16
    assert Budget.parse("8bpw").weight_bytes(LAYERS[:1]) == LAYERS[0].weights


def test_a_size_in_bytes_does_not_depend_on_the_layers() -> None:
    assert (
        Budget.parse("1.5MB").weight_bytes(LAYERS)
        == Budget.parse("1.5MB").weight_bytes(LAYERS[:1])
        == 1_500_000
    )


@pytest.mark.parametrize("text", ["1.5gib", "1.5GIB", "1.5GiB", "1.5gIb"])
def test_capitals_do_not_matter(text: str) -> None:
    assert Budget.parse(text).weight_bytes(LAYERS) == 3 * 2**29


@pytest.mark.parametrize("text", ["2.5BPW", "2.5 bpw", "  2.5bpw", "2.5bpw \n", "\t2.5  Bpw "])
def test_white_space_does_not_matter(text: str) -> None:
    assert Budget.parse(text).weight_bytes(LAYERS) == Budget.parse("2.5bpw").weight_bytes(LAYERS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1.9B", 1), ("0.9999kB", 999), ("1.00099MB", 1_000_990), (".5KiB", 512), ("0.3KiB", 307)],
)
def test_parts_of_a_byte_are_cut_off(text: str, expected: int) -> None:
    assert Budget.parse(text).weight_bytes(LAYERS) == expected


def test_bits_per_weight_are_rounded_down_to_whole_bytes() -> None:
    odd = (LayerSpec("odd", 0, "odd", 3, 3),)  # 9 weights
    assert Budget.parse("2.5bpw").weight_bytes(odd) == 2  # 22.5 bits
    assert Budget.parse("7bpw").weight_bytes(odd) == 7  # 63 bits


@PROPERTY
@given(
    amount=st.decimals(min_value="0.000001", max_value=10**6, places=6),
    unit=st.sampled_from(["bpw", *BYTES]),
)
def test_bytes_are_the_exact_floor_of_what_was_written(amount: Decimal, unit: str) -> None:
    exact = Fraction(amount) * (Fraction(WEIGHTS, 8) if unit == "bpw" else BYTES[unit])
    assert (
        Budget.parse(f"{amount:f}{unit}").weight_bytes(LAYERS)
        == exact.numerator // exact.denominator
    )


def test_a_budget_remembers_how_it_was_written() -> None:
    budget = Budget.parse(" 2.5 BPW")
    assert (budget.text, budget.amount, budget.unit) == (" 2.5 BPW", Decimal("2.5"), "bpw")


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "bpw",
        "2.5",
        "2,5bpw",
        "2.5 bpw or so",
        "1e3MB",
        "2.5.1bpw",
        "0x10B",
        "nanB",
        "infMB",
        "1/2GB",
        "2. 5bpw",
        "5.bpw",
    ],
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(BudgetError, match=r"write 2\.5bpw") as caught:
        Budget.parse(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", ["-1MB", "-2.5bpw", "+1MB"])
def test_a_signed_budget_is_refused(text: str) -> None:
    with pytest.raises(BudgetError, match=r"write 2\.5bpw"):
        Budget.parse(text)


@pytest.mark.parametrize("text", ["0B", "0.000bpw", "00GiB"])
def test_a_budget_of_nothing_is_refused(text: str) -> None:
    with pytest.raises(BudgetError, match="not positive"):
        Budget.parse(text)


@pytest.mark.parametrize("unit", ["TB", "bits", "k", "bpwx", "bp", "byte"])
def test_an_unknown_unit_is_named(unit: str) -> None:
    with pytest.raises(BudgetError, match=f"unknown unit '{unit}'"):
        Budget.parse(f"2{unit}")


def test_budget_errors_are_allocator_errors() -> None:
    with pytest.raises(AllocatorError):
        Budget.parse("2.5")
