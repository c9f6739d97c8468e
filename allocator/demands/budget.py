"""A budget as people write it, turned into one exact number of bytes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction
from math import floor

from allocator.errors import BudgetError
from quantizer.plans.plan import LayerSpec

SYNTAX = "2.5bpw (also bit, b/w), 1.2GiB, 900MB, 1.2G or 123456B; K, M, G and T are decimal"
"""How a budget is written, for help texts."""

LONGEST = 40
"""Characters that a budget may have."""

PER_WEIGHT = "bpw"
"""The unit of a budget in bits per weight."""

CHECKPOINT = "checkpoint"
LAYERS = "layers"
BUDGET_OF = (CHECKPOINT, LAYERS)
"""What a budget counts: all weight files of the checkpoint, or its quantized layers."""

_PER_WEIGHT_SPELLINGS = {"bpw", "bit", "bits", "b/w", "bits/w", "bits/weight"}
_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}
_UNITS = (
    {"b": 1}
    | {f"{prefix}b": 1000**power for prefix, power in _POWERS.items()}
    | {f"{prefix}ib": 1024**power for prefix, power in _POWERS.items()}
)
"""Bytes of each unit."""

_BUDGET = re.compile(r"\s*(?P<number>[0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*(?P<unit>[a-zA-Z/]+)\s*")
_NUMBER = re.compile(r"\s*(?P<number>[0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*")
_NEGATIVE = re.compile(r"\s*-\s*[0-9.,]+\s*[a-zA-Z/]*\s*")
_COMMA = re.compile(r"\s*(?P<number>[0-9]*(?:,[0-9]+)+(?:\.[0-9]+)?)\s*(?P<unit>[a-zA-Z/]*)\s*")
_THOUSANDS = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")
_DECIMAL_COMMA = re.compile(r"[0-9]*,[0-9]+")
_BITS_OR_BYTES = re.compile(r"(?P<prefix>[KMGT]i?)b")
_TOTAL_BITS = re.compile(r"(?P<prefix>[kmgt]i?)bits?", re.IGNORECASE)
_FORMS = "write 2.5bpw, 1.2GiB, 900MB or 123456B"


@dataclass(frozen=True, slots=True)
class Budget:
    """A size, of the whole checkpoint or of its quantized layers, see `budget_of`.

    Attributes:
        text: as the user wrote it.
        amount: the number in front of the unit.
        unit: `bpw` (bits per weight), or in lower case one of b, kb, mb, gb, tb (decimal) and kib,
            mib, gib, tib (binary).
    """

    text: str
    amount: Decimal
    unit: str

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Return the budget written as `text`, see `SYNTAX`.

        Spaces around the unit do not matter, nor do capitals, except where they decide between
        bits and bytes: `Mb` is refused, `mb`, `MB` and `M` are megabytes.

        Raises:
            BudgetError: it has another form, or is not positive; says what to write instead.
        """
        if len(text) > LONGEST:
            raise BudgetError(
                f"budget {text[:LONGEST]!r}... has {len(text)} characters and is not a size; "
                f"{_FORMS}"
            )
        match = _BUDGET.fullmatch(text)
        if match is None:
            raise BudgetError(_malformed(text))
        amount = Decimal(match["number"])
        if amount == 0:
            raise BudgetError(f"budget {text!r} is not positive; {_FORMS}")
        return cls(text, amount, _unit_of(text, match["number"], match["unit"]))

    @property
    def per_weight(self) -> bool:
        """Whether the budget is in bits per weight, so that its bytes depend on the layers."""
        return self.unit == PER_WEIGHT

    def weight_bytes(self, layers: Sequence[LayerSpec]) -> int:
        """Return the budget in whole bytes for these layers, rounded down.

        Bits per weight count the weights of these layers.
        """
        if self.per_weight:
            unit = Fraction(sum(layer.weights for layer in layers), 8)
        else:
            unit = Fraction(_UNITS[self.unit])
        return floor(Fraction(self.amount) * unit)


def budget_of(budget: Budget, wanted: str | None) -> str:
    """Return what a budget counts: `wanted`, or else what its unit says.

    Raises:
        BudgetError: `wanted` is not one of `BUDGET_OF`, or is the checkpoint for bits per weight.
    """
    if wanted is None:
        return LAYERS if budget.per_weight else CHECKPOINT
    if wanted not in BUDGET_OF:
        raise BudgetError(f"budget of {wanted!r}: use {' or '.join(BUDGET_OF)}")
    if wanted == CHECKPOINT and budget.per_weight:
        raise BudgetError(
            f"budget {budget.text!r} counts bits of quantized weights; give the size of the whole "
            "checkpoint in bytes, such as 900MB"
        )
    return wanted


def _unit_of(text: str, number: str, written: str) -> str:
    """Return the unit as `Budget.unit` has it.

    Raises:
        BudgetError: there is no such unit, or it leaves open whether bits or bytes are meant.
    """
    unit = written.lower()
    if unit in _PER_WEIGHT_SPELLINGS:
        return PER_WEIGHT
    if written == "b":
        raise BudgetError(
            f"budget {text!r}: bits or bytes? For bits per weight write {number}bpw, for bytes "
            f"write {number}B"
        )
    if match := _BITS_OR_BYTES.fullmatch(written):
        raise BudgetError(
            f"budget {text!r}: bits or bytes? For bytes write {number}{match['prefix']}B, for bits "
            f"write the same size in bytes, {_bits_as_bytes(number, match['prefix'])}"
        )
    if match := _TOTAL_BITS.fullmatch(written):
        raise BudgetError(
            f"budget {text!r} is in bits; write the same size in bytes, "
            f"{_bits_as_bytes(number, match['prefix'])}, or bits per weight, such as 2.5bpw"
        )
    if unit in _POWERS:
        return f"{unit}b"
    if unit in _UNITS:
        return unit
    raise BudgetError(f"budget {text!r} has the unknown unit {written!r}; {_FORMS}")


def _malformed(text: str) -> str:
    """Return the message for a text that is not a number and a unit."""
    if match := _NUMBER.fullmatch(text):
        number = match["number"]
        if Decimal(number) == 0:
            return f"budget {text!r} is not positive; {_FORMS}"
        return (
            f"budget {text!r} has no unit: write {number}bpw for bits per weight, {number}MB for "
            f"megabytes or {number}B for bytes"
        )
    if match := _COMMA.fullmatch(text):
        forms = [f"{number}{match['unit'] or 'bpw'}" for number in _without_comma(match["number"])]
        if forms:
            return f"budget {text!r} has a comma: write {' or '.join(forms)}"
    if _NEGATIVE.fullmatch(text):
        return f"budget {text!r} is not positive; {_FORMS}"
    return f"budget {text!r} is not a size; {_FORMS}"


def _without_comma(number: str) -> list[str]:
    """Return what a number with commas can mean: a comma for the decimal point, or thousands."""
    meanings = []
    if _DECIMAL_COMMA.fullmatch(number):
        meanings.append(number.replace(",", "."))
    if _THOUSANDS.fullmatch(number):
        meanings.append(number.replace(",", ""))
    return meanings


def _bits_as_bytes(number: str, prefix: str) -> str:
    """Return a number of bits with a prefix, such as 900 M, as the same size in bytes: 112.5MB."""
    with localcontext(prec=LONGEST + len("0.125")):
        eighth = (Decimal(number) / 8).normalize()
    return f"{eighth:f}{prefix[0].upper()}{prefix[1:].lower()}B"
