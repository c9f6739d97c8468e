"""A fidelity is one way to store a linear layer, and its exact size in bytes.

A layer's input columns are split in two parts. The high-impact part holds a share `ratio` of the columns at `bits_hi`,
the low part holds the rest at `bits_lo`. Both parts use asymmetric integer grids with one 16-bit scale and one integer
zero point for each group of `group_size` neighbouring columns. This module is plain Python: byte counts are needed where
neither torch nor numpy is installed.
"""

import re
from dataclasses import dataclass

from quantizer.errors import FidelityError

CODE_BITS = (2, 3, 4, 8)
COLUMN_STEP = 32
"""Parts are whole multiples of this many columns: 32 codes of b bits fill exactly b 32-bit words."""

RATIO_DIGITS = 6
"""Digits after the point that a ratio keeps, so that its printed form is exact."""

SCALE_BYTES = 2
_NAME = re.compile(r"int(?P<lo>[0-9])(\+(?P<hi>[0-9])r(?P<ratio>0?\.[0-9]+))?g(?P<group>[0-9]+)")


def words(values: int, bits: int) -> int:
    """Return how many 32-bit words hold `values` densely packed codes of `bits` bits."""
    return -(-values * bits // 32)


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How one layer is stored.

    Attributes:
        bits_lo: code width of the low part, one of `CODE_BITS`.
        bits_hi: code width of the high-impact part, at least `bits_lo`; equal to it when there is no such part.
        ratio: share of input columns in the high-impact part, 0 <= ratio < 1; 0 means a uniform layer.
        group_size: columns that share a scale and a zero point, a positive multiple of `COLUMN_STEP`.

    Raises:
        FidelityError: a field is outside the ranges above.
    """

    bits_lo: int
    bits_hi: int
    ratio: float
    group_size: int

    def __post_init__(self) -> None:
        """Refuse what cannot be stored, and settle on one spelling of a uniform fidelity."""
        if self.bits_lo not in CODE_BITS or self.bits_hi not in CODE_BITS:
            raise FidelityError(f"code widths {self.bits_lo} and {self.bits_hi}: use widths out of {CODE_BITS}")
        object.__setattr__(self, "ratio", round(self.ratio, RATIO_DIGITS))
        if not 0 <= self.ratio < 1:
            raise FidelityError(f"high-impact ratio {self.ratio}: use 0 <= ratio < 1; for 1 give bits_lo = bits_hi")
        if self.group_size <= 0 or self.group_size % COLUMN_STEP:
            raise FidelityError(f"group size {self.group_size}: use a positive multiple of {COLUMN_STEP}")
        if self.bits_hi < self.bits_lo:
            raise FidelityError(f"high-impact columns at {self.bits_hi} bits below the others at {self.bits_lo} bits")
        if (self.ratio == 0) != (self.bits_hi == self.bits_lo):
            raise FidelityError(
                f"ratio {self.ratio} with widths {self.bits_lo} and {self.bits_hi}: ratio 0 goes with equal widths only"
            )

    @classmethod
    def uniform(cls, bits: int, group_size: int) -> "Fidelity":
        """Return the fidelity that stores every column at `bits`."""
        return cls(bits, bits, 0.0, group_size)

    @classmethod
    def parse(cls, name: str) -> "Fidelity":
        """Return the fidelity called `name`, the inverse of `name`: `int3g64` or `int2+4r0.125g64`.

        Raises:
            FidelityError: the name has another form, or its numbers are out of range.
        """
        match = _NAME.fullmatch(name)
        if match is None:
            raise FidelityError(f"fidelity {name!r}: write int3g64, or int2+4r0.125g64 for a split layer")
        lo, group_size = int(match["lo"]), int(match["group"])
        if match["hi"] is None:
            return cls.uniform(lo, group_size)
        return cls(lo, int(match["hi"]), float(match["ratio"]), group_size)

    @property
    def name(self) -> str:
        """The short name that `parse` reads back."""
        if self.ratio == 0:
            return f"int{self.bits_lo}g{self.group_size}"
        ratio = f"{self.ratio:.{RATIO_DIGITS}f}".rstrip("0")
        return f"int{self.bits_lo}+{self.bits_hi}r{ratio}g{self.group_size}"

    def high_columns(self, in_features: int) -> int:
        """Return the number of high-impact columns of a layer with `in_features` input columns.

        The share is rounded to the nearest multiple of `COLUMN_STEP`, at least one step, and leaves the low part at least
        one column.
        """
        if self.ratio == 0:
            return 0
        steps = max(1, round(self.ratio * in_features / COLUMN_STEP))
        return min(steps, (in_features - 1) // COLUMN_STEP) * COLUMN_STEP

    def parts(self, in_features: int) -> tuple[tuple[int, int], ...]:
        """Return (columns, bits) of each non-empty part in stored order, the high-impact part first."""
        high = self.high_columns(in_features)
        split = ((high, self.bits_hi), (in_features - high, self.bits_lo))
        return tuple((columns, bits) for columns, bits in split if columns)

    def weight_bytes(self, out_features: int, in_features: int) -> int:
        """Return the bytes of all tensors that store such a layer: codes, scales, zero points, permutation.

        Codes take 4 * out * words(columns, bits), scales 2 * out * groups, zero points 4 * groups * words(out, bits), for each
        part with groups = ceil(columns / group_size); the permutation takes 2 bytes a column, 4 from 65,536 columns on. The
        bias, which is never quantized, is not included.
        """
        total = permutation_bytes(in_features)
        for columns, bits in self.parts(in_features):
            groups = -(-columns // self.group_size)
            total += 4 * out_features * words(columns, bits)
            total += groups * (SCALE_BYTES * out_features + 4 * words(out_features, bits))
        return total


def permutation_bytes(in_features: int) -> int:
    """Return the bytes of a layer's stored column order."""
    return in_features * (2 if in_features <= 2**16 else 4)
