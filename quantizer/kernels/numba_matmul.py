"""The loops of `quantizer.modules.matmul_cpu`, compiled on first use by numba, which keeps the result on disk.

Inner loops run over neighbouring outputs, whose words, scales and zero points the layout keeps
contiguous, so they become vector instructions without gathers. None holds the interpreter's lock.
Sizes are trusted; stored column numbers and row starts, which say where memory is read and written,
are not.
"""

import numpy as np
from numba import float32, int32, njit, uint32
from numpy.typing import NDArray

WORD = 32
"""Bits of a word."""
UNIT = 32
"""Codes that fill whole words at every width."""

BLOCK, STEP = 256, 16
"""Outputs and inputs whose codes, as floats, take half of a processor's nearest cache."""

Words = NDArray[np.uint32]
Floats = NDArray[np.float32]
Halves = NDArray[np.uint16]
Numbers = NDArray[np.int64]

Part = tuple[int, int, Words, Words, Halves, Words, int, Floats]
"""Width of the codes, group size, codes [words, outputs], zero points [groups, words], bits of 16-bit scales [groups, outputs] or
codes of scales [groups, words] with their width (0 for none) and what they count, [outputs]."""


def _kept_on_disk() -> bool:
    """Return whether compiled code can be kept.

    Where nothing can be written, each process compiles anew.
    """
    try:
        njit(cache=True)(_kept_on_disk)
    except RuntimeError:  # numba has found no folder
        return False
    return True


CACHE_ON_DISK = _kept_on_disk()
_SUMS = {"reassoc", "contract"}  # in any order, fused; what is no number stays none


@njit(cache=CACHE_ON_DISK)
def _unpack(words: Words, bits: int, first: int, values: Floats) -> None:
    """Write the codes packed along a row of words as floats, from the code `first` on."""
    mask = uint32((1 << bits) - 1)
    for at in range(len(values)):
        bit = (first + at) * bits
        word, shift = bit >> 5, bit & 31
        code = words[word] >> uint32(shift)
        if shift + bits > WORD:
            code |= words[word + 1] << uint32(WORD - shift)
        values[at] = float32(int32(code & mask))


@njit(cache=CACHE_ON_DISK)
def _column(codes: Words, bits: int, column: int, first: int, values: Floats) -> None:
    """Write the codes of one column as floats, for the outputs from `first` on."""
    mask, last = uint32((1 << bits) - 1), first + len(values)
    bit = column * bits
    row, shift = bit >> 5, bit & 31
    low = codes[row, first:last]
    if shift + bits <= WORD:
        for at in range(len(values)):
            values[at] = float32(int32((low[at] >> uint32(shift)) & mask))
    else:
        high = codes[row + 1, first:last]
        for at in range(len(values)):
            values[at] = float32(
                int32(((low[at] >> uint32(shift)) | (high[at] << uint32(WORD - shift))) & mask)
            )


@njit(cache=CACHE_ON_DISK, fastmath=_SUMS)
def _add2(codes: Words, x: Floats, sums: Floats) -> None:
    """Add the products of sixteen inputs with a word of two-bit codes of each output."""
    for at in range(len(sums)):
        word, total = codes[at], sums[at]
        for code in range(16):
            total += float32(int32((word >> uint32(2 * code)) & uint32(3))) * x[code]
        sums[at] = total


@njit(cache=CACHE_ON_DISK, fastmath=_SUMS)
def _add3(low: Words, middle: Words, high: Words, x: Floats, sums: Floats) -> None:
    """Add the products of 32 inputs with three words of three-bit codes.

    Two codes lie across a border of words.
    """
    for at in range(len(sums)):
        first, second, third, total = low[at], middle[at], high[at], sums[at]
        for code in range(10):
            total += float32(int32((first >> uint32(3 * code)) & uint32(7))) * x[code]
        total += float32(int32((first >> uint32(30)) | ((second & uint32(1)) << uint32(2)))) * x[10]
        for code in range(10):
            total += float32(int32((second >> uint32(3 * code + 1)) & uint32(7))) * x[11 + code]
        total += float32(int32((second >> uint32(31)) | ((third & uint32(3)) << uint32(1)))) * x[21]
        for code in range(10):
            total += float32(int32((third >> uint32(3 * code + 2)) & uint32(7))) * x[22 + code]
        sums[at] = total


@njit(cache=CACHE_ON_DISK, fastmath=_SUMS)
def _add4(codes: Words, x: Floats, sums: Floats) -> None:
    """Add the products of eight inputs with a word of four-bit codes of each output."""
    for at in range(len(sums)):
        word, total = codes[at], sums[at]
        for code in range(8):
            total += float32(int32((word >> uint32(4 * code)) & uint32(15))) * x[code]
        sums[at] = total


@njit(cache=CACHE_ON_DISK, fastmath=_SUMS)
def _add8(codes: Words, x: Floats, sums: Floats) -> None:
    """Add the products of four inputs with a word of eight-bit codes of each output."""
    for at in range(len(sums)):
        word, total = codes[at], sums[at]
        for code in range(4):
            total += float32(int32((word >> uint32(8 * code)) & uint32(255))) * x[code]
        sums[at] = total


@njit(cache=CACHE_ON_DISK)
def _add(bits: int, codes: Words, row: int, first: int, x: Floats, sums: Floats) -> None:
    """Add the products of 32 inputs with the words that begin at a row."""
    last = first + len(sums)
    if bits == 3:
        _add3(
            codes[row, first:last], codes[row + 1, first:last], codes[row + 2, first:last], x, sums
        )
        return
    per_word = UNIT // bits
    for word in range(bits):
        line, inputs = codes[row + word, first:last], x[word * per_word : (word + 1) * per_word]
        if bits == 2:
            _add2(line, inputs, sums)
        elif bits == 4:
            _add4(line, inputs, sums)
        else:
            _add8(line, inputs, sums)


@njit(cache=CACHE_ON_DISK)
def _widen(bits: Halves, values: Floats) -> None:
    """Write what the bits of finite 16-bit floats stand for."""
    patterns = values.view(np.uint32)
    for at in range(len(values)):
        half = uint32(bits[at])
        patterns[at] = ((half & uint32(0x8000)) << uint32(16)) | (
            (half & uint32(0x7FFF)) << uint32(13)
        )
    for at in range(len(values)):
        values[at] *= float32(2.0**112)  # the exponents of both kinds begin so far apart


@njit(cache=CACHE_ON_DISK)
def _grid(part: Part, group: int, first: int, zero: Floats, scale: Floats) -> None:
    """Write zero points and scales of a group for the outputs from `first` on."""
    bits, _, _, zeros, scales, scale_codes, scale_bits, unit = part
    _unpack(zeros[group], bits, first, zero)
    if scale_bits:
        _unpack(scale_codes[group], scale_bits, first, scale)
        for at in range(len(scale)):
            scale[at] *= unit[first + at]
    else:
        _widen(scales[group, first : first + len(scale)], scale)


@njit(cache=CACHE_ON_DISK, fastmath=_SUMS, nogil=True)
def multiply(part: Part, x: Floats, first: int, out: Floats) -> None:
    """Add the product of a part with its inputs to some outputs.

    Out[n] += sum_k weight[first + n, k] * x[k].
    """
    bits, group_size, codes, zeros = part[:4]
    sums, zero, scale = np.empty_like(out), np.empty_like(out), np.empty_like(out)
    columns = len(x)
    for group in range(len(zeros)):
        begin, end = group * group_size, min((group + 1) * group_size, columns)
        whole = begin + (end - begin) // UNIT * UNIT
        sums[:] = 0
        for at in range(begin, whole, UNIT):
            _add(bits, codes, at // UNIT * bits, first, x[at : at + UNIT], sums)
        for column in range(whole, end):
            _column(codes, bits, column, first, scale)
            for at in range(len(out)):
                sums[at] += scale[at] * x[column]
        total = x[begin:end].sum()
        _grid(part, group, first, zero, scale)
        for at in range(len(out)):
            out[at] += scale[at] * (sums[at] - zero[at] * total)


@njit(cache=CACHE_ON_DISK, fastmath=_SUMS)
def _add_unpacked(codes: Floats, x: Floats, sums: Floats) -> None:
    """Add the products of eight inputs with their codes, floats [8 * BLOCK]."""
    x0, x1, x2, x3, x4, x5, x6, x7 = x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]
    for at in range(len(sums)):
        total = (
            sums[at]
            + x0 * codes[at]
            + x1 * codes[at + BLOCK]
            + x2 * codes[at + 2 * BLOCK]
            + x3 * codes[at + 3 * BLOCK]
        )
        total += (
            x4 * codes[at + 4 * BLOCK] + x5 * codes[at + 5 * BLOCK] + x6 * codes[at + 6 * BLOCK]
        )
        sums[at] = total + x7 * codes[at + 7 * BLOCK]


@njit(cache=CACHE_ON_DISK, fastmath=_SUMS)
def _add_step(unpacked: Floats, x: Floats, sums: Floats) -> None:
    """Add the products of up to `STEP` inputs with their codes."""
    whole = len(x) // 8 * 8
    for column in range(0, whole, 8):
        _add_unpacked(unpacked[column * BLOCK : (column + 8) * BLOCK], x[column : column + 8], sums)
    for column in range(whole, len(x)):
        codes, factor = unpacked[column * BLOCK : column * BLOCK + len(sums)], x[column]
        for at in range(len(sums)):
            sums[at] += codes[at] * factor


@njit(cache=CACHE_ON_DISK, fastmath=_SUMS, nogil=True)
def multiply_rows(part: Part, x: Floats, border: tuple[int, int], out: Floats) -> None:
    """Do as `multiply` for several rows and the outputs within the border, x [rows, in] and out [rows, all outputs].

    Each code is unpacked once, to the nearest cache.
    """
    bits, group_size, codes, zeros = part[:4]
    rows, columns = x.shape
    unpacked, sums = np.zeros(STEP * BLOCK, np.float32), np.empty((rows, BLOCK), np.float32)
    zero, scale = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for first in range(border[0], border[1], BLOCK):
        size = min(BLOCK, border[1] - first)
        for group in range(len(zeros)):
            begin, end = group * group_size, min((group + 1) * group_size, columns)
            sums[:] = 0
            for at in range(begin, end, STEP):
                width = min(STEP, end - at)
                for column in range(width):
                    _column(
                        codes,
                        bits,
                        at + column,
                        first,
                        unpacked[column * BLOCK : column * BLOCK + size],
                    )
                for row in range(rows):
                    _add_step(unpacked, x[row, at : at + width], sums[row, :size])
            _grid(part, group, first, zero[:size], scale[:size])
            for row in range(rows):
                total = x[row, begin:end].sum()
                line, results = sums[row], out[row, first : first + size]
                for at in range(size):
                    results[at] += scale[at] * (line[at] - zero[at] * total)


@njit(cache=CACHE_ON_DISK)
def _round(values: Floats, bits: Halves) -> None:
    """Write the bits of the nearest bfloat16 of finite values, ties to even."""
    patterns = values.view(np.uint32)
    for at in range(len(bits)):
        bits[at] = (
            patterns[at] + uint32(0x7FFF) + ((patterns[at] >> uint32(16)) & uint32(1))
        ) >> uint32(16)


@njit(cache=CACHE_ON_DISK)
def _check_places(places: Numbers, rows: int) -> None:
    for place in places:
        if place < 0 or place >= rows:
            raise IndexError("a stored column number is not one of the layer's columns")


@njit(cache=CACHE_ON_DISK)
def _check_starts(starts: Numbers, count: int) -> None:
    if starts[0] < 0 or starts[-1] > count:
        raise IndexError("outliers do not begin where the row starts say")
    for at in range(1, len(starts)):
        if starts[at] < starts[at - 1]:
            raise IndexError("outliers do not begin where the row starts say")


@njit(cache=CACHE_ON_DISK, nogil=True)
def expand(part: Part, places: Numbers, groups: tuple[int, int], first: int, tile: Floats) -> None:
    """Write weights of some outputs and some groups: tile[places[k], n] = weight[first + n, k].

    They are rounded as `quantizer.packed.grid.dequantize` rounds.
    """
    _check_places(places, len(tile))
    bits, group_size, codes = part[:3]
    outputs = tile.shape[1]
    zero, scale = np.empty(outputs, np.float32), np.empty(outputs, np.float32)
    for group in range(groups[0], groups[1]):
        _grid(part, group, first, zero, scale)
        for column in range(group * group_size, min((group + 1) * group_size, len(places))):
            values = tile[places[column]]
            _column(codes, bits, column, first, values)
            for at in range(outputs):
                values[at] = (values[at] - zero[at]) * scale[at]


@njit(cache=CACHE_ON_DISK, nogil=True)
def expand_rounded(
    part: Part, places: Numbers, groups: tuple[int, int], first: int, tile: Halves
) -> None:
    """Write the bits of the same weights as the nearest bfloat16."""
    _check_places(places, len(tile))
    bits, group_size, codes = part[:3]
    outputs = tile.shape[1]
    zero, scale, values = (
        np.empty(outputs, np.float32),
        np.empty(outputs, np.float32),
        np.empty(outputs, np.float32),
    )
    for group in range(groups[0], groups[1]):
        _grid(part, group, first, zero, scale)
        for column in range(group * group_size, min((group + 1) * group_size, len(places))):
            _column(codes, bits, column, first, values)
            for at in range(outputs):
                values[at] = (values[at] - zero[at]) * scale[at]
            _round(values, tile[places[column]])


@njit(cache=CACHE_ON_DISK, fastmath=_SUMS, nogil=True)
def multiply_outliers(
    starts: Numbers, columns: Numbers, values: Floats, x: Floats, first: int, out: Floats
) -> None:
    """Add the product of single weights in compressed rows with all inputs in their own order to some outputs."""
    _check_places(columns, len(x))
    _check_starts(starts, len(values))
    for at in range(len(out)):
        for index in range(starts[first + at], starts[first + at + 1]):
            out[at] += values[index] * x[columns[index]]


@njit(cache=CACHE_ON_DISK, nogil=True)
def add_outliers(
    starts: Numbers, columns: Numbers, values: Floats, first: int, tile: Floats
) -> None:
    """Add single weights in compressed rows to a tile of some outputs, [in, outputs]."""
    _check_places(columns, len(tile))
    _check_starts(starts, len(values))
    for at in range(tile.shape[1]):
        for index in range(starts[first + at], starts[first + at + 1]):
            tile[columns[index], at] += values[index]
