"""Triton kernels over packed weights; the README.md here draws the layout.

A unit is 32 neighbouring positions of one output: at width b its codes fill b words. Kernels work
on tiles of units x outputs, and take the codes out of their words one place after another, so that
nothing moves between threads.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

MAGIC_BITS = tl.constexpr(0x4B000000)
MAGIC = tl.constexpr(8388608.0)

ONE_ROW = tl.constexpr(0)
SOME_ROWS = tl.constexpr(1)
WRITE = tl.constexpr(2)
"""What is done with codes.

Multiplied with one row of inputs, multiplied with a tile of rows by matrix instructions, or
written.
"""


@triton.jit
def _to_float(code):  # type: ignore[no-untyped-def]
    """Return unsigned integers below 2**23 as float32.

    As the lowest bits of 2**23, as conversions are slow.
    """
    return (code | MAGIC_BITS).to(tl.float32, bitcast=True) - MAGIC


@triton.jit
def _packed(base, row, stride, at, mask, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the codes at some places of rows of words, uint32; zero where the mask says no."""
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
def _use(  # type: ignore[no-untyped-def]
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
    KIND: tl.constexpr,
):
    """Use the codes [units, outputs] of one place in their units.

    Return the accumulator and the sum of inputs of each unit.
    """
    column = tl.load(columns + position, mask=live, other=0).to(tl.int64)
    value = _to_float(code)
    if KIND == ONE_ROW:
        inputs = tl.load(x + column, mask=live, other=0.0).to(tl.float32)
        acc += value * inputs[:, None]
        total += inputs
    elif KIND == SOME_ROWS:
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
def _use_part(  # type: ignore[no-untyped-def]
    acc, x, x_stride, rows, columns, codes, zeros, scales, row_scales, start, count, outputs, output, target, first, step,
    BITS: tl.constexpr, LOW_BITS: tl.constexpr, GROUP_UNITS: tl.constexpr, SCALE_BITS: tl.constexpr,
    UNITS: tl.constexpr, OUTPUTS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Use the codes of one part: `count` columns from the stored position `start` on, every `step`-th tile of units."""
    units, word_rows = tl.cdiv(count, 32), tl.cdiv(count * BITS, 32)
    inside = output < outputs
    for at in range(first * UNITS, units, step * UNITS):
        unit = at + tl.arange(0, UNITS)
        group = unit // GROUP_UNITS
        both = (unit < units)[:, None] & inside[None, :]
        zero = _to_float(
            _packed(zeros, group[:, None], tl.cdiv(outputs * BITS, 32), output[None, :], both, BITS)
        )
        if SCALE_BITS == 16:
            place = scales + group[:, None].to(tl.int64) * outputs + output[None, :]
            scale = tl.load(place, mask=both, other=0.0).to(tl.float32)
        else:
            code = _packed(
                scales,
                group[:, None],
                tl.cdiv(outputs * SCALE_BITS, 32),
                output[None, :],
                both,
                SCALE_BITS,
            )
            row_scale = tl.load(row_scales + output, mask=inside, other=0.0).to(tl.float32)
            scale = _to_float(code) * (row_scale * 2.0 ** (LOW_BITS - BITS))[None, :]
        sums = tl.zeros([UNITS, OUTPUTS], tl.float32) if KIND == ONE_ROW else acc
        total = tl.zeros([UNITS], tl.float32)
        before = tl.zeros([UNITS, OUTPUTS], tl.uint32)
        for word in tl.static_range(BITS):
            row = unit * BITS + word
            place = codes + row[:, None].to(tl.int64) * outputs + output[None, :]
            words = tl.load(place, mask=both & (row < word_rows)[:, None], other=0).to(
                tl.uint32, bitcast=True
            )
            if (32 * word) % BITS != 0:  # a code lies across the border
                code = (before >> (32 - (32 * word) % BITS)) | (words << ((32 * word) % BITS))
                position = unit * 32 + 32 * word // BITS
                sums, total = _use(
                    sums, total, code & ((1 << BITS) - 1), scale, zero, x, x_stride, rows, columns + start, position,
                    position < count, target, output, inside, KIND,
                )  # fmt: skip
            for place_in_unit in tl.static_range(
                (32 * word + BITS - 1) // BITS, 32 * (word + 1) // BITS
            ):
                code = (words >> (place_in_unit * BITS - 32 * word)) & ((1 << BITS) - 1)
                position = unit * 32 + place_in_unit
                sums, total = _use(
                    sums, total, code, scale, zero, x, x_stride, rows, columns + start, position,
                    position < count, target, output, inside, KIND,
                )  # fmt: skip
            before = words
        if KIND == ONE_ROW:
            acc += scale * (sums - zero * total[:, None])
        else:
            acc = sums
    return acc


@triton.jit
def fused_kernel(  # type: ignore[no-untyped-def]
    x, out, columns, high_codes, high_zeros, high_scales, low_codes, low_zeros, low_scales, row_scales,
    row_count, inputs, outputs, high_count, x_stride,
    HIGH_BITS: tl.constexpr, LOW_BITS: tl.constexpr, GROUP_UNITS: tl.constexpr, SCALE_BITS: tl.constexpr,
    KIND: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, OUTPUTS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """out[split, m, n] = sum of x[m, k] * weight[n, k] over a share of the units, float32.

    Grid: outputs, shares, rows.
    """
    split = tl.program_id(1)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    rows = tl.where(row < row_count, row, -1)
    acc = tl.zeros([UNITS if KIND == ONE_ROW else ROWS, OUTPUTS], tl.float32)
    acc = _use_part(
        acc, x, x_stride, rows, columns, high_codes, high_zeros, high_scales, row_scales, 0, high_count, outputs, output, out,
        split, SPLIT, HIGH_BITS, LOW_BITS, GROUP_UNITS, SCALE_BITS, UNITS, OUTPUTS, KIND,
    )  # fmt: skip
    acc = _use_part(
        acc, x, x_stride, rows, columns, low_codes, low_zeros, low_scales, row_scales, high_count, inputs - high_count, outputs,
        output, out, split, SPLIT, LOW_BITS, LOW_BITS, GROUP_UNITS, SCALE_BITS, UNITS, OUTPUTS, KIND,
    )  # fmt: skip
    if KIND == ONE_ROW:
        tl.store(
            out + split.to(tl.int64) * outputs + output, tl.sum(acc, axis=0), mask=output < outputs
        )
    else:
        place = out + (split * row_count + row)[:, None].to(tl.int64) * outputs + output[None, :]
        tl.store(place, acc, mask=(row < row_count)[:, None] & (output < outputs)[None, :])


@triton.jit
def expand_kernel(  # type: ignore[no-untyped-def]
    tile, columns, high_codes, high_zeros, high_scales, low_codes, low_zeros, low_scales, row_scales,
    inputs, outputs, high_count, first, stride,
    HIGH_BITS: tl.constexpr, LOW_BITS: tl.constexpr, GROUP_UNITS: tl.constexpr, SCALE_BITS: tl.constexpr,
    UNITS: tl.constexpr, OUTPUTS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """tile[k, n] = weight[first + n, k], rounded to the tile's dtype.

    Grid: tiles of outputs, shares of the units.
    """
    split = tl.program_id(1)
    output = first + tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    none = tl.zeros([UNITS, OUTPUTS], tl.float32)
    target, rows = tile - first, tl.arange(0, UNITS)
    none = _use_part(
        none, tile, stride, rows, columns, high_codes, high_zeros, high_scales, row_scales, 0, high_count, outputs, output, target,
        split, SPLIT, HIGH_BITS, LOW_BITS, GROUP_UNITS, SCALE_BITS, UNITS, OUTPUTS, WRITE,
    )  # fmt: skip
    none = _use_part(
        none, tile, stride, rows, columns, low_codes, low_zeros, low_scales, row_scales, high_count, inputs - high_count, outputs,
        output, target, split, SPLIT, LOW_BITS, LOW_BITS, GROUP_UNITS, SCALE_BITS, UNITS, OUTPUTS, WRITE,
    )  # fmt: skip


@triton.jit
def pack_kernel(  # type: ignore[no-untyped-def]
    values,
    words,
    columns,
    outputs,
    stride,
    BITS: tl.constexpr,
    UNITS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """words[w, n]: the codes that values[n, k] round to, packed.

    Grid: tiles of units, tiles of outputs.
    """
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = (output < outputs)[None, :]
    source = values + output[None, :].to(tl.int64) * stride
    word_rows = tl.cdiv(columns * BITS, 32)
    word = tl.zeros([UNITS, OUTPUTS], tl.uint32)
    for place in tl.static_range(32):
        column = (unit * 32 + place)[:, None]
        value = tl.load(source + column, mask=(column < columns) & inside, other=0.0)
        bounded = tl.minimum(tl.maximum(value, 0.0), 2.0**BITS - 1)
        code = (bounded + MAGIC).to(tl.uint32, bitcast=True) & (
            (1 << BITS) - 1
        )  # the addition rounds half to even
        word |= code << (place * BITS % 32)
        if place * BITS % 32 + BITS >= 32:
            row = (unit * BITS + place * BITS // 32)[:, None]
            target = words + row.to(tl.int64) * outputs + output[None, :]
            tl.store(target, word.to(tl.int32, bitcast=True), mask=(row < word_rows) & inside)
            word = code >> (32 - place * BITS % 32)  # what of the code lies across the border


@dataclass(frozen=True, slots=True)
class TileShape:
    """How a kernel cuts its work.

    Attributes:
        units: units of 32 columns that are worked on at once; 16 or more for matrix instructions.
        outputs: outputs of a program.
        warps: warps of a program.
    """

    units: int
    outputs: int
    warps: int
