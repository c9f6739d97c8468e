"""A budget is what its author wrote, in whole bytes and never more."""

import re
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from allocator.demands.budget import Budget
from allocator.errors import AllocatorError, BudgetError
from quantizer.plans.plan import LayerSpec
from tests.support.synthetic_profiles import PROPERTY, make_layers

LAYERS = make_layers(4)
WEIGHTS = sum(layer.out_features * layer.in_features for layer in LAYERS)
BYTES = {
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
PER_WEIGHT = ["bpw", "bit", "bits", "b/w", "bits/w", "bits/weight"]


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


@pytest.mark.parametrize("unit", PER_WEIGHT)
def test_bits_per_weight_have_many_spellings(unit: str) -> None:
    for text in (f"2.5{unit}", f"2.5 {unit.upper()}"):
        budget = Budget.parse(text)
        assert (budget.amount, budget.unit, budget.per_weight) == (Decimal("2.5"), "bpw", True)


@pytest.mark.parametrize(
    ("text", "unit", "expected"),
    [
        ("1.2GiB", "gib", 1_288_490_188),
        ("900MB", "mb", 900_000_000),
        ("900M", "mb", 900_000_000),
        ("900 m", "mb", 900_000_000),
        ("1.2G", "gb", 1_200_000_000),
        ("1.2 gb", "gb", 1_200_000_000),
        ("123456B", "b", 123_456),
        ("1T", "tb", 10**12),
        ("64k", "kb", 64_000),
        ("64 KB", "kb", 64_000),
        ("64 kib", "kib", 65_536),
        ("0.5TiB", "tib", 2**39),
    ],
)
def test_sizes_as_people_write_them(text: str, unit: str, expected: int) -> None:
    budget = Budget.parse(text)
    assert (budget.text, budget.unit, budget.per_weight) == (text, unit, False)
    assert budget.weight_bytes(LAYERS) == expected


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
    unit=st.sampled_from([*PER_WEIGHT, *BYTES]),
    space=st.text(" \t", max_size=3),
)
def test_bytes_are_the_exact_floor_of_what_was_written(
    amount: Decimal, unit: str, space: str
) -> None:
    exact = Fraction(amount) * (Fraction(WEIGHTS, 8) if unit in PER_WEIGHT else BYTES[unit])
    assert (
        Budget.parse(f"{amount:f}{space}{unit}").weight_bytes(LAYERS)
        == exact.numerator // exact.denominator
    )


DIGITS = st.text("0123456789", min_size=1, max_size=17)


@PROPERTY
@given(whole=DIGITS, part=DIGITS, unit=st.sampled_from(["bpw", "TiB", "B"]))
def test_no_digit_is_lost_however_many_there_are(whole: str, part: str, unit: str) -> None:
    amount = Fraction(int(whole + part), 10 ** len(part))
    assume(amount > 0)
    exact = amount * (Fraction(WEIGHTS, 8) if unit == "bpw" else BYTES[unit])
    found = Budget.parse(f"{whole}.{part}{unit}").weight_bytes(LAYERS)
    assert found == exact.numerator // exact.denominator


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
        "nan",
        "nanB",
        "inf",
        "infMB",
        "1e-3bpw",
        "1.234,5MB",
        "1_000MB",
        "\u0663MB",
        "1/2GB",
        "2. 5bpw",
        "5.bpw",
    ],
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(BudgetError, match=r"write 2\.5bpw") as caught:
        Budget.parse(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "forms"),
    [
        ("2,5bpw", ["2.5bpw"]),
        ("2,5 bits", ["2.5bits"]),
        ("2,5", ["2.5bpw"]),
        (",5GB", [".5GB"]),
        ("1,234,567B", ["1234567B"]),
        ("1,234.5MB", ["1234.5MB"]),
        ("1,234MB", ["1.234MB", "1234MB"]),
        ("900", ["900bpw", "900MB", "900B"]),
        ("2.5", ["2.5bpw", "2.5MB", "2.5B"]),
        ("2.5b", ["2.5bpw", "2.5B"]),
        ("900Mb", ["900MB", "112.5MB"]),
        ("1.2 Gb", ["1.2GB", "0.15GB"]),
        ("8Kb", ["8KB", "1KB"]),
        ("1Tb", ["1TB", "0.125TB"]),
        ("1.2Gib", ["1.2GiB", "0.15GiB"]),
        ("900Mbit", ["112.5MB", "2.5bpw"]),
        ("900 mbits", ["112.5MB", "2.5bpw"]),
        ("4Gibit", ["0.5GiB", "2.5bpw"]),
    ],
)
def test_what_can_be_guessed_is_refused_with_the_form_to_write(text: str, forms: list[str]) -> None:
    with pytest.raises(BudgetError) as caught:
        Budget.parse(text)
    message = str(caught.value)
    assert repr(text) in message
    assert [word for word in re.split(r"[ ,:?;]+", message) if word in forms] == forms
    for form in forms:
        Budget.parse(form)


@PROPERTY
@given(
    number=st.decimals(min_value="0.001", max_value=10**9, places=3), prefix=st.sampled_from("KMGT")
)
def test_bits_are_named_in_bytes_exactly(number: Decimal, prefix: str) -> None:
    with pytest.raises(BudgetError) as caught:
        Budget.parse(f"{number:f}{prefix}bit")
    form = re.search(rf"in bytes, (\S+{prefix}B)", str(caught.value))
    assert form is not None
    assert Budget.parse(form[1]).amount * 8 == number


@pytest.mark.parametrize("text", ["9" * 41 + "B", "0" * 10_000 + "1MB", "2.5bpw" + " " * 40])
def test_a_text_of_absurd_length_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(BudgetError, match=rf"{len(text)} characters .*write 2\.5bpw") as caught:
        Budget.parse(text)
    assert len(str(caught.value)) < 200
    assert Budget.parse("9" * 39 + "B").weight_bytes(()) == 10**39 - 1


@pytest.mark.parametrize("text", ["-1MB", "-2.5bpw", "+1MB"])
def test_a_signed_budget_is_refused(text: str) -> None:
    with pytest.raises(BudgetError, match=r"write 2\.5bpw"):
        Budget.parse(text)


@pytest.mark.parametrize(
    "text", ["0B", "0.000bpw", "00GiB", "0", "0.0", "-1MB", "-2.5", "- 2,5bpw"]
)
def test_a_budget_of_nothing_is_refused(text: str) -> None:
    with pytest.raises(BudgetError, match="not positive"):
        Budget.parse(text)


@pytest.mark.parametrize("unit", ["PB", "bitz", "kk", "bpwx", "bp", "byte", "w/b"])
def test_an_unknown_unit_is_named(unit: str) -> None:
    with pytest.raises(BudgetError, match=f"unknown unit '{unit}'"):
        Budget.parse(f"2{unit}")


def test_budget_errors_are_allocator_errors() -> None:
    with pytest.raises(AllocatorError):
        Budget.parse("2.5")
