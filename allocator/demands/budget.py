"""A budget as people write it, turned into one exact number of bytes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from allocator.errors import BudgetError
from quantizer.plans.plan import LayerSpec

_UNITS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}
_BUDGET = re.compile(r"^\s*(?P<number>\d+(\.\d+)?|\.\d+)\s*(?P<unit>[a-zA-Z]+)\s*$")
_FORMS = "write 2.5bpw, 1.2GiB, 900MB or 123456B"


@dataclass(frozen=True, slots=True)
class Budget:
    """A size for the quantized layers: codes, scales, zero points and permutations.

    Attributes:
        text: as the user wrote it.
        amount: the number in front of the unit.
        unit: `bpw`, or one of B, kB, MB, GB, KiB, MiB, GiB in lower case.
    """

    text: str
    amount: Decimal
    unit: str

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Return the budget written as `text`, such as 2.5bpw, 1.2GiB, 900MB or 123456B.

        Capitals do not matter.

        Raises:
            BudgetError: it has another form, or is zero.
        """
        match = _BUDGET.match(text)
        if match is None:
            raise BudgetError(f"budget {text!r} is not a size; {_FORMS}")
        unit, amount = match["unit"].lower(), Decimal(match["number"])
        if unit != "bpw" and unit not in _UNITS:
            raise BudgetError(f"budget {text!r} has the unknown unit {match['unit']!r}; {_FORMS}")
        if amount <= 0:
            raise BudgetError(f"budget {text!r} is not positive; {_FORMS}")
        return cls(text, amount, unit)

    def weight_bytes(self, layers: Sequence[LayerSpec]) -> int:
        """Return the budget in whole bytes for these layers, rounded down.

        Bits per weight count the layers' weights.
        """
        if self.unit == "bpw":
            return int(self.amount * sum(layer.weights for layer in layers) / 8)
        return int(self.amount * _UNITS[self.unit])
