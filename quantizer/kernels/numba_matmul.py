"""Matrix products and dequantization on a CPU, for `quantizer.modules.matmul_cpu`.

numba compiles the functions on first use and keeps the result on disk. Inner loops run over
neighbouring outputs, whose words, scales and zero points are contiguous in the layout (README.md),
so they become vector instructions without gathers. All release the interpreter's lock. Array sizes
are trusted. Stored column numbers and row starts decide where memory is read and written, so they
are checked. All functions are in one file, as numba's cache does not notice changes in others.
"""

import numpy as np
from numpy.typing import NDArray

from quantizer.kernels.jit import compiled, float32, int32, uint32

WORD_BITS = 32
UNIT_CODES = 32
"""So many codes fill whole words at every width."""

BLOCK_OUTPUTS = 256
STEP_COLUMNS = 16
"""The codes of so many outputs and columns take 16 KiB as floats, half of a CPU's L1 cache."""

Words = NDArray[np.uint32]
Floats = NDArray[np.float32]
Halves = NDArray[np.uint16]
Indices = NDArray[np.int64]

PackedPart = tuple[int, int, Words, Words, Halves, Words, int, Floats]
"""A part: (bits, group size, codes, zeros, scales, scale codes, scale bits, scale units).

Codes are [words, outputs], zero points [groups, words]. Either scales are bit patterns of float16,
[groups, outputs], and scale bits are 0; or scale codes are packed, [groups, words], and a scale is
its code times the scale unit of its output, [outputs].
"""


_SUMS = {"reassoc", "contract"}
"""Sums may be reordered, and multiplications fused with additions; NaN stays NaN."""


@compiled()
def _unpack_row(words: Words, bits: int, first: int, values: Floats) -> None:
    """Write codes that are packed along a row of words as floats, from the code `first` on."""
    mask = uint32((1 << bits) - 1)
    for at in range(len(values)):
        bit = (first + at) * bits
        word, shift = bit >> 5, bit & 31
        code = words[word] >> uint32(shift)
        if shift + bits > WORD_BITS:
            code |= words[word + 1] << uint32(WORD_BITS - shift)
        values[at] = float32(int32(code & mask))


@compiled()
def _unpack_column(codes: Words, bits: int, column: int, first: int, values: Floats) -> None:
    """Write the codes of one column as floats, for the outputs from `first` on."""
    mask, last = uint32((1 << bits) - 1), first + len(values)
    bit = column * bits
    row, shift = bit >> 5, bit & 31
    low = codes[row, first:last]
    if shift + bits <= WORD_BITS:
        for at in range(len(values)):
            values[at] = float32(int32((low[at] >> uint32(shift)) & mask))
    else:
        high = codes[row + 1, first:last]
        for at in range(len(values)):
            values[at] = float32(
                int32(((low[at] >> uint32(shift)) | (high[at] << uint32(WORD_BITS - shift))) & mask)
            )


@compiled(fastmath=_SUMS)
def _add_codes2(codes: Words, x: Floats, sums: Floats) -> None:
    """Add the products of 16 inputs with one word of two-bit codes of each output."""
    for at in range(len(sums)):
        word, total = codes[at], sums[at]
        for code in range(16):
            total += float32(int32((word >> uint32(2 * code)) & uint32(3))) * x[code]
        sums[at] = total


@compiled(fastmath=_SUMS)
def _add_codes3(low: Words, middle: Words, high: Words, x: Floats, sums: Floats) -> None:
    """Add the products of 32 inputs with three words of three-bit codes of each output.

    Codes 10 and 21 each lie in two words.
    """
    for at in range(len(sums)):
        first, second = low[at], middle[at]
        third, total = high[at], sums[at]
        for code in range(10):
            total += float32(int32((first >> uint32(3 * code)) & uint32(7))) * x[code]
        total += float32(int32((first >> uint32(30)) | ((second & uint32(1)) << uint32(2)))) * x[10]
        for code in range(10):
            total += float32(int32((second >> uint32(3 * code + 1)) & uint32(7))) * x[11 + code]
        total += float32(int32((second >> uint32(31)) | ((third & uint32(3)) << uint32(1)))) * x[21]
        for code in range(10):
            total += float32(int32((third >> uint32(3 * code + 2)) & uint32(7))) * x[22 + code]
        sums[at] = total


@compiled(fastmath=_SUMS)
def _add_codes4(codes: Words, x: Floats, sums: Floats) -> None:
    """Add the products of eight inputs with one word of four-bit codes of each output."""
    for at in range(len(sums)):
        word, total = codes[at], sums[at]
        for code in range(8):
            total += float32(int32((word >> uint32(4 * code)) & uint32(15))) * x[code]
        sums[at] = total


@compiled(fastmath=_SUMS)
def _add_codes8(codes: Words, x: Floats, sums: Floats) -> None:
    """Add the products of four inputs with one word of eight-bit codes of each output."""
    for at in range(len(sums)):
        word, total = codes[at], sums[at]
        for code in range(4):
            total += float32(int32((word >> uint32(8 * code)) & uint32(255))) * x[code]
        sums[at] = total


@compiled()
def _add_codes(bits: int, codes: Words, row: int, first: int, x: Floats, sums: Floats) -> None:
    """Add the products of 32 inputs with their codes, in the words from `row` on."""
    last = first + len(sums)
    if bits == 3:
        _add_codes3(
            codes[row, first:last], codes[row + 1, first:last], codes[row + 2, first:last], x, sums
        )
        return
    per_word = UNIT_CODES // bits
    for word in range(bits):
        line, inputs = codes[row + word, first:last], x[word * per_word : (word + 1) * per_word]
        if bits == 2:
            _add_codes2(line, inputs, sums)
        elif bits == 4:
            _add_codes4(line, inputs, sums)
        else:
            _add_codes8(line, inputs, sums)


@compiled()
def _float16_to_float32(bits: Halves, values: Floats) -> None:
    """Write the values of finite float16 numbers, given by their bits."""
    patterns = values.view(np.uint32)
    for at in range(len(values)):
        half = uint32(bits[at])
        patterns[at] = ((half & uint32(0x8000)) << uint32(16)) | (
            (half & uint32(0x7FFF)) << uint32(13)
        )
    for at in range(len(values)):
        values[at] *= float32(2.0**112)  # the exponent biases differ by 127 - 15


@compiled()
def _load_grid(part: PackedPart, group: int, first: int, zero: Floats, scale: Floats) -> None:
    """Write zero points and scales of one group for the outputs from `first` on."""
    bits, _, _, zeros, scales, scale_codes, scale_bits, unit = part
    _unpack_row(zeros[group], bits, first, zero)
    if scale_bits:
        _unpack_row(scale_codes[group], scale_bits, first, scale)
        for at in range(len(scale)):
            scale[at] *= unit[first + at]
    else:
        _float16_to_float32(scales[group, first : first + len(scale)], scale)


@compiled(fastmath=_SUMS, nogil=True)
def multiply(part: PackedPart, x: Floats, first: int, out: Floats) -> None:
    """Add the product of a part with one row of inputs: out[n] += sum_k weight[first + n, k] x[k].

    The codes of a group are summed first: scale * (sum_k code_k x_k - zero * sum_k x_k).

    Args:
        part: the stored part.
        x: inputs in stored order, [columns of the part].
        first: first output.
        out: results of some outputs, [outputs].
    """
    bits, group_size, codes, zeros = part[:4]
    sums = np.empty_like(out)
    zero, scale = np.empty_like(out), np.empty_like(out)
    columns = len(x)
    for group in range(len(zeros)):
        begin, end = group * group_size, min((group + 1) * group_size, columns)
        whole = begin + (end - begin) // UNIT_CODES * UNIT_CODES
        sums[:] = 0
        for at in range(begin, whole, UNIT_CODES):
            _add_codes(bits, codes, at // UNIT_CODES * bits, first, x[at : at + UNIT_CODES], sums)
        for column in range(whole, end):
            _unpack_column(codes, bits, column, first, scale)
            for at in range(len(out)):
                sums[at] += scale[at] * x[column]
        total = x[begin:end].sum()
        _load_grid(part, group, first, zero, scale)
        for at in range(len(out)):
            out[at] += scale[at] * (sums[at] - zero[at] * total)


@compiled(fastmath=_SUMS)
def _add_eight_columns(codes: Floats, x: Floats, sums: Floats) -> None:
    """Add the products of eight inputs with their unpacked codes, floats [8 * BLOCK_OUTPUTS]."""
    x0, x1 = x[0], x[1]
    x2, x3 = x[2], x[3]
    x4, x5 = x[4], x[5]
    x6, x7 = x[6], x[7]
    for at in range(len(sums)):
        total = (
            sums[at]
            + x0 * codes[at]
            + x1 * codes[at + BLOCK_OUTPUTS]
            + x2 * codes[at + 2 * BLOCK_OUTPUTS]
            + x3 * codes[at + 3 * BLOCK_OUTPUTS]
        )
        total += (
            x4 * codes[at + 4 * BLOCK_OUTPUTS]
            + x5 * codes[at + 5 * BLOCK_OUTPUTS]
            + x6 * codes[at + 6 * BLOCK_OUTPUTS]
        )
        sums[at] = total + x7 * codes[at + 7 * BLOCK_OUTPUTS]


@compiled(fastmath=_SUMS)
def _add_columns(unpacked: Floats, x: Floats, sums: Floats) -> None:
    """Add the products of up to `STEP_COLUMNS` inputs with their unpacked codes."""
    whole = len(x) // 8 * 8
    for column in range(0, whole, 8):
        _add_eight_columns(
            unpacked[column * BLOCK_OUTPUTS : (column + 8) * BLOCK_OUTPUTS],
            x[column : column + 8],
            sums,
        )
    for column in range(whole, len(x)):
        codes, factor = (
            unpacked[column * BLOCK_OUTPUTS : column * BLOCK_OUTPUTS + len(sums)],
            x[column],
        )
        for at in range(len(sums)):
            sums[at] += codes[at] * factor


@compiled(fastmath=_SUMS, nogil=True)
def multiply_rows(part: PackedPart, x: Floats, border: tuple[int, int], out: Floats) -> None:
    """Do what `multiply` does for several rows; each code is unpacked once, into the L1 cache.

    Args:
        part: the stored part.
        x: inputs in stored order, [rows, columns of the part].
        border: first output, and the one after the last.
        out: results of all outputs, [rows, outputs].
    """
    bits, group_size, codes, zeros = part[:4]
    rows, columns = x.shape
    unpacked, sums = (
        np.zeros(STEP_COLUMNS * BLOCK_OUTPUTS, np.float32),
        np.empty((rows, BLOCK_OUTPUTS), np.float32),
    )
    zero, scale = np.empty(BLOCK_OUTPUTS, np.float32), np.empty(BLOCK_OUTPUTS, np.float32)
    for first in range(border[0], border[1], BLOCK_OUTPUTS):
        size = min(BLOCK_OUTPUTS, border[1] - first)
        for group in range(len(zeros)):
            begin, end = group * group_size, min((group + 1) * group_size, columns)
            sums[:] = 0
            for at in range(begin, end, STEP_COLUMNS):
                width = min(STEP_COLUMNS, end - at)
                for column in range(width):
                    _unpack_column(
                        codes,
                        bits,
                        at + column,
                        first,
                        unpacked[column * BLOCK_OUTPUTS : column * BLOCK_OUTPUTS + size],
                    )
                for row in range(rows):
                    _add_columns(unpacked, x[row, at : at + width], sums[row, :size])
            _load_grid(part, group, first, zero[:size], scale[:size])
            for row in range(rows):
                total = x[row, begin:end].sum()
                line, results = sums[row], out[row, first : first + size]
                for at in range(size):
                    results[at] += scale[at] * (line[at] - zero[at] * total)


@compiled()
def _round_to_bfloat16(values: Floats, bits: Halves) -> None:
    """Write the bits of the nearest bfloat16 of finite values, ties to even."""
    patterns = values.view(np.uint32)
    for at in range(len(bits)):
        bits[at] = (
            patterns[at] + uint32(0x7FFF) + ((patterns[at] >> uint32(16)) & uint32(1))
        ) >> uint32(16)


@compiled()
def _check_columns(columns: Indices, inputs: int) -> None:
    for column in columns:
        if column < 0 or column >= inputs:
            raise IndexError("a stored column number is not one of the layer's columns")


@compiled()
def _check_row_starts(starts: Indices, count: int) -> None:
    if starts[0] < 0 or starts[-1] > count:
        raise IndexError("outliers do not begin where the row starts say")
    for at in range(1, len(starts)):
        if starts[at] < starts[at - 1]:
            raise IndexError("outliers do not begin where the row starts say")


@compiled(nogil=True)
def dequantize_tile(
    part: PackedPart, columns: Indices, groups: tuple[int, int], first: int, tile: Floats
) -> None:
    """Write weights of some outputs and groups: tile[columns[k], n] = weight[first + n, k].

    They are rounded as `quantizer.packed.grid.dequantize` rounds.

    Args:
        part: the stored part.
        columns: input column at each of its stored positions.
        groups: first group, and the one after the last.
        first: first output.
        tile: [inputs of the layer, outputs].
    """
    _check_columns(columns, len(tile))
    bits, group_size, codes = part[:3]
    outputs = tile.shape[1]
    zero, scale = np.empty(outputs, np.float32), np.empty(outputs, np.float32)
    for group in range(groups[0], groups[1]):
        _load_grid(part, group, first, zero, scale)
        for at in range(group * group_size, min((group + 1) * group_size, len(columns))):
            values = tile[columns[at]]
            _unpack_column(codes, bits, at, first, values)
            for output in range(outputs):
                values[output] = (values[output] - zero[output]) * scale[output]


@compiled(nogil=True)
def dequantize_tile_bfloat16(
    part: PackedPart, columns: Indices, groups: tuple[int, int], first: int, tile: Halves
) -> None:
    """Do what `dequantize_tile` does, in the bits of the nearest bfloat16."""
    _check_columns(columns, len(tile))
    bits, group_size, codes = part[:3]
    outputs = tile.shape[1]
    zero, scale = np.empty(outputs, np.float32), np.empty(outputs, np.float32)
    values = np.empty(outputs, np.float32)
    for group in range(groups[0], groups[1]):
        _load_grid(part, group, first, zero, scale)
        for at in range(group * group_size, min((group + 1) * group_size, len(columns))):
            _unpack_column(codes, bits, at, first, values)
            for output in range(outputs):
                values[output] = (values[output] - zero[output]) * scale[output]
            _round_to_bfloat16(values, tile[columns[at]])


@compiled(fastmath=_SUMS, nogil=True)
def multiply_outliers(
    starts: Indices, columns: Indices, values: Floats, x: Floats, first: int, out: Floats
) -> None:
    """Add the product of outliers with one row of inputs to some outputs.

    Args:
        starts: where the outliers of each row begin, and at last their number, [all outputs + 1].
        columns: input column of each outlier.
        values: their values.
        x: inputs in the layer's own order, [inputs].
        first: first output.
        out: results of some outputs, [outputs].
    """
    _check_columns(columns, len(x))
    _check_row_starts(starts, len(values))
    for at in range(len(out)):
        for index in range(starts[first + at], starts[first + at + 1]):
            out[at] += values[index] * x[columns[index]]


@compiled(nogil=True)
def add_outliers(
    starts: Indices, columns: Indices, values: Floats, first: int, tile: Floats
) -> None:
    """Add outliers to a tile of dequantized weights, [inputs, outputs]; see `multiply_outliers`."""
    _check_columns(columns, len(tile))
    _check_row_starts(starts, len(values))
    for at in range(tile.shape[1]):
        for index in range(starts[first + at], starts[first + at + 1]):
            tile[columns[index], at] += values[index]
