"""What the Triton kernels do with one part of a layer: unpack its codes, multiply or write.

A unit is 32 neighbouring stored positions of one output: at b bits its codes fill b words. Kernels
work on tiles of units x outputs, and unpack the codes of a word one after the other, so that
nothing moves between threads.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

MAGIC_BITS = tl.constexpr(0x4B000000)
MAGIC = tl.constexpr(8388608.0)

MULTIPLY_ROW = tl.constexpr(0)
MULTIPLY_ROWS = tl.constexpr(1)
WRITE_WEIGHTS = tl.constexpr(2)
"""What a kernel does with weights.

It multiplies them by one row of inputs, or by a tile of rows with matrix instructions, or it writes
them.
"""


@dataclass(frozen=True, slots=True)
class TileShape:
    """How a kernel divides its work.

    Attributes:
        units: units of 32 columns that a program processes at once; matrix instructions need 16 or
            more.
        outputs: outputs of a program.
        warps: warps of a program.
    """

    units: int
    outputs: int
    warps: int


@triton.jit
def _to_float(code):  # type: ignore[no-untyped-def]
    """Return unsigned integers below 2**23 as float32.

    They become the lowest bits of the float 2**23, which is then subtracted: GPUs convert integers
    at a quarter of the rate of additions.
    """
    return (code | MAGIC_BITS).to(tl.float32, bitcast=True) - MAGIC


@triton.jit
def _unpack(base, row, stride, at, mask, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return codes from rows of words, uint32: code `at` of each row, zero outside the mask."""
    bit = at * BITS
    shift = (bit & 31).to(tl.uint32)
    place = base + row.to(tl.int64) * stride + (bit >> 5)
    code = tl.load(place, mask=mask, other=0).to(tl.uint32, bitcast=True) >> shift
    if 32 % BITS != 0:
        rest = tl.load(place + 1, mask=mask & (shift + BITS > 32), other=0).to(
            tl.uint32, bitcast=True
        )
        code |= (rest << 1) << (31 - shift)
    return code & ((1 << BITS) - 1)


@triton.jit
def _process_codes(  # type: ignore[no-untyped-def]
    acc,
    total,
    code,
    scale,
    zero,
    x,
    x_stride,
    rows,
    columns,
    position,
    live,
    target,
    output,
    inside,
    MODE: tl.constexpr,
):
    """Multiply or write the weights of one position in each unit.

    Args:
        acc: accumulator: sums of code times input [units, outputs], or products [rows, outputs].
        total: sums of inputs, [units].
        code: [units, outputs].
        scale: [units, outputs].
        zero: [units, outputs].
        x: pointer to the inputs, or to the tile that is written.
        x_stride: elements between their rows.
        rows: numbers of rows, negative outside; unused with one row.
        columns: pointer to the input column of each stored position.
        position: stored position in each unit, [units].
        live: whether the position exists, [units].
        target: pointer to the first column of the written tile.
        output: numbers of outputs, [outputs].
        inside: whether the output exists, [outputs].
        MODE: what to do, see above.

    Returns:
        The accumulator and the sums of inputs.
    """
    column = tl.load(columns + position, mask=live, other=0).to(tl.int64)
    value = _to_float(code)
    if MODE == MULTIPLY_ROW:
        inputs = tl.load(x + column, mask=live, other=0.0).to(tl.float32)
        acc += value * inputs[:, None]
        total += inputs
    elif MODE == MULTIPLY_ROWS:
        place = x + rows[:, None].to(tl.int64) * x_stride + column[None, :]
        inputs = tl.load(place, mask=(rows >= 0)[:, None] & live[None, :], other=0.0)
        acc = tl.dot(inputs, ((value - zero) * scale).to(inputs.dtype), acc, input_precision="ieee")
    else:
        place = target + column[:, None] * x_stride + output[None, :]
        tl.store(
            place,
            ((value - zero) * scale).to(target.dtype.element_ty),
            mask=live[:, None] & inside[None, :],
        )
    return acc, total


@triton.jit
def process_part(  # type: ignore[no-untyped-def]
    acc,
    x,
    x_stride,
    rows,
    columns,
    codes,
    zeros,
    scales,
    row_scales,
    start,
    count,
    outputs,
    output,
    target,
    first,
    step,
    BITS: tl.constexpr,
    LOW_BITS: tl.constexpr,
    GROUP_UNITS: tl.constexpr,
    SCALE_BITS: tl.constexpr,
    UNITS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    MODE: tl.constexpr,
):
    """Multiply or write the weights of one part, and return the accumulator.

    The part has `count` columns from the stored position `start` on. This program takes every
    `step`-th tile of units from the tile `first` on.
    """
    units, word_rows = tl.cdiv(count, 32), tl.cdiv(count * BITS, 32)
    inside = output < outputs
    for at in range(first * UNITS, units, step * UNITS):
        unit = at + tl.arange(0, UNITS)
        group = unit // GROUP_UNITS
        both = (unit < units)[:, None] & inside[None, :]
        zero = _to_float(
            _unpack(zeros, group[:, None], tl.cdiv(outputs * BITS, 32), output[None, :], both, BITS)
        )
        if SCALE_BITS == 16:
            place = scales + group[:, None].to(tl.int64) * outputs + output[None, :]
            scale = tl.load(place, mask=both, other=0.0).to(tl.float32)
        else:
            code = _unpack(
                scales,
                group[:, None],
                tl.cdiv(outputs * SCALE_BITS, 32),
                output[None, :],
                both,
                SCALE_BITS,
            )
            row_scale = tl.load(row_scales + output, mask=inside, other=0.0).to(tl.float32)
            scale = _to_float(code) * (row_scale * 2.0 ** (LOW_BITS - BITS))[None, :]
        sums = tl.zeros([UNITS, OUTPUTS], tl.float32) if MODE == MULTIPLY_ROW else acc
        total = tl.zeros([UNITS], tl.float32)
        before = tl.zeros([UNITS, OUTPUTS], tl.uint32)
        for word in tl.static_range(BITS):
            row = unit * BITS + word
            place = codes + row[:, None].to(tl.int64) * outputs + output[None, :]
            words = tl.load(place, mask=both & (row < word_rows)[:, None], other=0).to(
                tl.uint32, bitcast=True
            )
            if (32 * word) % BITS != 0:  # a code lies in the word before and in this one
                code = (before >> (32 - (32 * word) % BITS)) | (words << ((32 * word) % BITS))
                position = unit * 32 + 32 * word // BITS
                sums, total = _process_codes(
                    sums,
                    total,
                    code & ((1 << BITS) - 1),
                    scale,
                    zero,
                    x,
                    x_stride,
                    rows,
                    columns + start,
                    position,
                    position < count,
                    target,
                    output,
                    inside,
                    MODE,
                )
            for place_in_unit in tl.static_range(
                (32 * word + BITS - 1) // BITS, 32 * (word + 1) // BITS
            ):
                code = (words >> (place_in_unit * BITS - 32 * word)) & ((1 << BITS) - 1)
                position = unit * 32 + place_in_unit
                sums, total = _process_codes(
                    sums,
                    total,
                    code,
                    scale,
                    zero,
                    x,
                    x_stride,
                    rows,
                    columns + start,
                    position,
                    position < count,
                    target,
                    output,
                    inside,
                    MODE,
                )
            before = words
        if MODE == MULTIPLY_ROW:
            acc += scale * (sums - zero * total[:, None])
        else:
            acc = sums
    return acc
