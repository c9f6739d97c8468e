"""Triton kernels over packed weights: products, dequantization, packing.

README.md draws the layout.
"""

import triton
import triton.language as tl

from quantizer.kernels.triton_parts import MAGIC, MULTIPLY_ROW, WRITE_WEIGHTS, process_part


@triton.jit
def fused_kernel(  # type: ignore[no-untyped-def]
    x,
    out,
    columns,
    high_codes,
    high_zeros,
    high_scales,
    low_codes,
    low_zeros,
    low_scales,
    row_scales,
    row_count,
    inputs,
    outputs,
    high_count,
    x_stride,
    HIGH_BITS: tl.constexpr,
    LOW_BITS: tl.constexpr,
    GROUP_UNITS: tl.constexpr,
    SCALE_BITS: tl.constexpr,
    MODE: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Write out[split, m, n] = sum_k x[m, k] weight[n, k] over one share of the units, float32.

    Grid: tiles of outputs, shares of the units, tiles of rows.
    """
    split = tl.program_id(1)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    rows = tl.where(row < row_count, row, -1)
    acc = tl.zeros([UNITS if MODE == MULTIPLY_ROW else ROWS, OUTPUTS], tl.float32)
    acc = process_part(
        acc,
        x,
        x_stride,
        rows,
        columns,
        high_codes,
        high_zeros,
        high_scales,
        row_scales,
        0,
        high_count,
        outputs,
        output,
        out,
        split,
        SPLIT,
        HIGH_BITS,
        LOW_BITS,
        GROUP_UNITS,
        SCALE_BITS,
        UNITS,
        OUTPUTS,
        MODE,
    )
    acc = process_part(
        acc,
        x,
        x_stride,
        rows,
        columns,
        low_codes,
        low_zeros,
        low_scales,
        row_scales,
        high_count,
        inputs - high_count,
        outputs,
        output,
        out,
        split,
        SPLIT,
        LOW_BITS,
        LOW_BITS,
        GROUP_UNITS,
        SCALE_BITS,
        UNITS,
        OUTPUTS,
        MODE,
    )
    if MODE == MULTIPLY_ROW:
        tl.store(
            out + split.to(tl.int64) * outputs + output, tl.sum(acc, axis=0), mask=output < outputs
        )
    else:
        place = out + (split * row_count + row)[:, None].to(tl.int64) * outputs + output[None, :]
        tl.store(place, acc, mask=(row < row_count)[:, None] & (output < outputs)[None, :])


@triton.jit
def dequantize_kernel(  # type: ignore[no-untyped-def]
    tile,
    columns,
    high_codes,
    high_zeros,
    high_scales,
    low_codes,
    low_zeros,
    low_scales,
    row_scales,
    inputs,
    outputs,
    high_count,
    first,
    stride,
    HIGH_BITS: tl.constexpr,
    LOW_BITS: tl.constexpr,
    GROUP_UNITS: tl.constexpr,
    SCALE_BITS: tl.constexpr,
    UNITS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Write tile[k, n] = weight[first + n, k], rounded to the dtype of the tile.

    Grid: tiles of outputs, shares of the units.
    """
    split = tl.program_id(1)
    output = first + tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    none = tl.zeros([UNITS, OUTPUTS], tl.float32)
    target, rows = tile - first, tl.arange(0, UNITS)
    none = process_part(
        none,
        tile,
        stride,
        rows,
        columns,
        high_codes,
        high_zeros,
        high_scales,
        row_scales,
        0,
        high_count,
        outputs,
        output,
        target,
        split,
        SPLIT,
        HIGH_BITS,
        LOW_BITS,
        GROUP_UNITS,
        SCALE_BITS,
        UNITS,
        OUTPUTS,
        WRITE_WEIGHTS,
    )
    none = process_part(
        none,
        tile,
        stride,
        rows,
        columns,
        low_codes,
        low_zeros,
        low_scales,
        row_scales,
        high_count,
        inputs - high_count,
        outputs,
        output,
        target,
        split,
        SPLIT,
        LOW_BITS,
        LOW_BITS,
        GROUP_UNITS,
        SCALE_BITS,
        UNITS,
        OUTPUTS,
        WRITE_WEIGHTS,
    )


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
    """Write the packed codes that values[n, k] round to, words[w, n].

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
        rounded = bounded + MAGIC  # the addition rounds half to even
        code = rounded.to(tl.uint32, bitcast=True) & ((1 << BITS) - 1)
        word |= code << (place * BITS % 32)
        if place * BITS % 32 + BITS >= 32:
            row = (unit * BITS + place * BITS // 32)[:, None]
            target = words + row.to(tl.int64) * outputs + output[None, :]
            tl.store(target, word.to(tl.int32, bitcast=True), mask=(row < word_rows) & inside)
            word = code >> (32 - place * BITS % 32)  # the rest of the code
