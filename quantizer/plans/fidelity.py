"""A fidelity: one way to store a linear layer, and its exact size in bytes.

The input columns of a layer are split into two parts. The high-impact part holds a share `ratio` of
the columns at `bits_hi` bits, the low part holds the others at `bits_lo` bits. Both parts use
asymmetric integer grids, with one scale and one integer zero point for each group of `group_size`
neighbouring columns in each row. Three options are independent of each other: scales of few bits,
outliers (single weights stored in 16 bits), and a low-rank adapter. This module is plain Python,
because the solver and the service count bytes without torch and numpy.
"""

import re
from dataclasses import dataclass

from quantizer.errors import FidelityError

CODE_BITS = (2, 3, 4, 8)
COLUMN_MULTIPLE = 32
"""A part has a multiple of so many columns, because 32 codes of b bits fill exactly b words."""

RATIO_DIGITS = 6
"""Ratios are rounded to so many decimals, so that a name states them exactly."""

SCALE_BITS = (16, 8, 6)
"""Bits of a group's scale.

16 is a float16; 8 and 6 are unsigned integers, multiplied by one float16 for each row.
"""

FLOAT16_BYTES = 2
OUTLIER_SHARE_LIMIT = 0.1
"""Outlier shares are below this.

An outlier takes 4 bytes or more, so with a larger share wider codes are the better use of bytes.
"""
ADAPTER_RANK_LIMIT = 256

_NAME = re.compile(
    r"int(?P<lo>[0-9])(\+(?P<hi>[0-9])r(?P<ratio>0?\.[0-9]+))?g(?P<group>[0-9]{1,9})"
    r"(s(?P<scale>[0-9]{1,9}))?(o(?P<share>0?\.[0-9]+))?(a(?P<rank>[0-9]{1,9}))?"
)


def word_count(values: int, bits: int) -> int:
    """Return the number of 32-bit words that hold `values` densely packed codes of `bits` bits."""
    return -(-values * bits // 32)


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How one layer is stored.

    Attributes:
        bits_lo: bits of a code in the low part, one of `CODE_BITS`.
        bits_hi: bits of a code in the high-impact part, more than `bits_lo`; equal to it if there
            is no such part.
        ratio: share of input columns in the high-impact part, 0 <= ratio < 1; 0 if all columns have
            the same width.
        group_size: number of columns that share a scale and a zero point, a positive multiple of
            `COLUMN_MULTIPLE`.
        scale_bits: bits of a group's scale, one of `SCALE_BITS`; see `quantizer.packed.scales`.
        outlier_share: share of weights that are stored in 16 bits beside the grid, 0 for none,
            below `OUTLIER_SHARE_LIMIT`; see `quantizer.packed.outliers`.
        adapter_rank: rank of the low-rank adapter, 0 for none, at most `ADAPTER_RANK_LIMIT`; see
            `quantizer.packed.adapter`.

    Raises:
        FidelityError: a field is outside the ranges above.
    """

    bits_lo: int
    bits_hi: int
    ratio: float
    group_size: int
    scale_bits: int = 16
    outlier_share: float = 0.0
    adapter_rank: int = 0

    def __post_init__(self) -> None:
        """Check the fields, and round the shares to the digits of a name."""
        if self.bits_lo not in CODE_BITS or self.bits_hi not in CODE_BITS:
            raise FidelityError(
                f"code widths {self.bits_lo} and {self.bits_hi}: use widths out of {CODE_BITS}"
            )
        object.__setattr__(self, "ratio", round(self.ratio, RATIO_DIGITS))
        if not 0 <= self.ratio < 1:
            raise FidelityError(
                f"high-impact ratio {self.ratio}: use 0 <= ratio < 1; for 1 give bits_lo = bits_hi"
            )
        if self.group_size <= 0 or self.group_size % COLUMN_MULTIPLE:
            raise FidelityError(
                f"group size {self.group_size}: use a positive multiple of {COLUMN_MULTIPLE}"
            )
        if self.bits_hi < self.bits_lo:
            raise FidelityError(
                f"high-impact columns at {self.bits_hi} bits below the others at {self.bits_lo} "
                "bits"
            )
        if (self.ratio == 0) != (self.bits_hi == self.bits_lo):
            raise FidelityError(
                f"ratio {self.ratio} with widths {self.bits_lo} and {self.bits_hi}: ratio 0 goes "
                "with equal widths only"
            )
        self._check_options()

    def _check_options(self) -> None:
        if self.scale_bits not in SCALE_BITS:
            raise FidelityError(
                f"scales of {self.scale_bits} bits: use a width out of {SCALE_BITS}"
            )
        share = round(self.outlier_share, RATIO_DIGITS)
        if not 0 <= share < OUTLIER_SHARE_LIMIT or (share == 0) != (self.outlier_share == 0):
            raise FidelityError(
                f"outlier share {self.outlier_share}: use 0 for none, or {10**-RATIO_DIGITS:.6f} "
                f"<= share < {OUTLIER_SHARE_LIMIT}"
            )
        object.__setattr__(self, "outlier_share", share)
        if not 0 <= self.adapter_rank <= ADAPTER_RANK_LIMIT:
            raise FidelityError(
                f"adapter rank {self.adapter_rank}: use 0 for none, or at most {ADAPTER_RANK_LIMIT}"
            )

    @classmethod
    def uniform(cls, bits: int, group_size: int) -> "Fidelity":
        """Return the fidelity that stores every column at `bits`."""
        return cls(bits, bits, 0.0, group_size)

    @classmethod
    def parse(cls, name: str) -> "Fidelity":
        """Return the fidelity that a name such as `int2+4r0.125g64s6` stands for.

        The name is `int<bits_lo>[+<bits_hi>r<ratio>]g<group_size>`, followed by the options
        `s<scale_bits>`, `o<outlier_share>` and `a<adapter_rank>` in this order.

        Raises:
            FidelityError: the name has another form, or a number is out of range.
        """
        match = _NAME.fullmatch(name)
        if match is None:
            raise FidelityError(
                f"fidelity {name!r}: write int3g64, or int2+4r0.125g64 for a split layer; "
                "options follow in the order s8, o0.005, a16, as in int3g64s8o0.005a16"
            )
        lo = int(match["lo"])
        return cls(
            lo,
            int(match["hi"] or lo),
            float(match["ratio"] or 0),
            int(match["group"]),
            int(match["scale"] or SCALE_BITS[0]),
            float(match["share"] or 0),
            int(match["rank"] or 0),
        )

    @property
    def name(self) -> str:
        """The name from which `parse` returns this fidelity."""
        split = f"+{self.bits_hi}r{_decimal(self.ratio)}" if self.ratio else ""
        scales = f"s{self.scale_bits}" if self.scale_bits < SCALE_BITS[0] else ""
        outliers = f"o{_decimal(self.outlier_share)}" if self.outlier_share else ""
        adapter = f"a{self.adapter_rank}" if self.adapter_rank else ""
        return f"int{self.bits_lo}{split}g{self.group_size}{scales}{outliers}{adapter}"

    def high_columns(self, in_features: int) -> int:
        """Return the number of high-impact columns of a layer with `in_features` input columns.

        The share of columns is rounded to the nearest multiple of `COLUMN_MULTIPLE`. It is at least
        one such multiple, and leaves the low part at least one column.
        """
        if self.ratio == 0:
            return 0
        steps = max(1, round(self.ratio * in_features / COLUMN_MULTIPLE))
        return min(steps, (in_features - 1) // COLUMN_MULTIPLE) * COLUMN_MULTIPLE

    def parts(self, in_features: int) -> tuple[tuple[int, int], ...]:
        """Return (columns, bits) of each part that is not empty, the high-impact part first."""
        high = self.high_columns(in_features)
        split = ((high, self.bits_hi), (in_features - high, self.bits_lo))
        return tuple((columns, bits) for columns, bits in split if columns)

    def outlier_count(self, out_features: int, in_features: int) -> int:
        """Return the number of outliers: the share of all weights, rounded, at least one."""
        return (
            max(1, round(self.outlier_share * (out_features * in_features)))
            if self.outlier_share
            else 0
        )

    def stored_adapter_rank(self, out_features: int, in_features: int) -> int:
        """Return the rank of the stored adapter, which the layer's shape may limit."""
        return min(self.adapter_rank, out_features, in_features)

    def weight_bytes(self, out_features: int, in_features: int) -> int:
        """Return the exact bytes of all tensors that store such a layer, without its bias.

        With groups = ceil(columns / group_size) for each part of some columns at some bits:

        * codes take 4 * out * word_count(columns, bits);
        * zero points take 4 * groups * word_count(out, bits);
        * scales of 16 bits take 2 * out * groups; scales of s < 16 bits take
          4 * groups * word_count(out, s), and 2 * out for the row scales of the layer;
        * the column order takes 2 bytes a column, or 4 for a layer of more than 65,536 columns;
        * each outlier takes 2 bytes and a column number of that width, the row starts take
          4 * (out + 1);
        * an adapter of rank r takes 2 * r * (in + out).

        The bias is never quantized.
        """
        total = permutation_bytes(in_features)
        for columns, bits in self.parts(in_features):
            groups = -(-columns // self.group_size)
            total += 4 * (
                out_features * word_count(columns, bits) + groups * word_count(out_features, bits)
            )
            coded = self.scale_bits < SCALE_BITS[0]
            total += groups * (
                4 * word_count(out_features, self.scale_bits)
                if coded
                else FLOAT16_BYTES * out_features
            )
        if self.scale_bits < SCALE_BITS[0]:
            total += FLOAT16_BYTES * out_features
        if self.outlier_share:
            count = self.outlier_count(out_features, in_features)
            total += count * (FLOAT16_BYTES + column_bytes(in_features)) + 4 * (out_features + 1)
        return total + FLOAT16_BYTES * self.stored_adapter_rank(out_features, in_features) * (
            out_features + in_features
        )


def column_bytes(in_features: int) -> int:
    """Return the bytes of a column number in a layer of `in_features` columns."""
    return 2 if in_features <= 2**16 else 4


def permutation_bytes(in_features: int) -> int:
    """Return the bytes of a layer's stored column order."""
    return in_features * column_bytes(in_features)


def _decimal(share: float) -> str:
    return f"{share:.{RATIO_DIGITS}f}".rstrip("0")
