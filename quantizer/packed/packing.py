"""Dense packing of unsigned codes of few bits into 32-bit words, and its exact inverse.

In each row, code i of b bits occupies bits i*b .. i*b+b-1 of a little-endian bit stream, which is
padded with zero bits to whole words. Codes of three bits cross the borders of bytes and words, so
32 codes of b bits always fill exactly b words.
"""

from math import gcd

import torch
from torch import Tensor

from quantizer.plans.fidelity import word_count


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return unsigned codes, packed along the last axis.

    Args:
        codes: integers in 0 .. 2**bits - 1, any integer dtype, [rows, values].
        bits: code width, 1 to 8.

    Returns:
        int32 [rows, word_count(values, bits)].
    """
    rows, values = codes.shape
    per_unit, unit_bytes = 8 // gcd(bits, 8), bits // gcd(bits, 8)
    units = -(-values // per_unit)
    padded = torch.zeros(rows, units * per_unit, dtype=torch.int64, device=codes.device)
    padded[:, :values] = codes
    shifts = torch.arange(per_unit, device=codes.device) * bits
    # [rows, units, 1], below 2**56
    unit = (padded.view(rows, units, per_unit) << shifts).sum(-1, keepdim=True)
    byte_shifts = torch.arange(unit_bytes, device=codes.device) * 8
    stream = ((unit >> byte_shifts) & 0xFF).to(torch.uint8).view(rows, -1)
    packed = torch.zeros(rows, word_count(values, bits) * 4, dtype=torch.uint8, device=codes.device)
    used = min(stream.shape[1], packed.shape[1])
    packed[:, :used] = stream[:, :used]
    return packed.view(torch.int32)


def unpack(packed: Tensor, bits: int, values: int) -> Tensor:
    """Return the codes that `pack` packed.

    Args:
        packed: int32 [rows, word_count(values, bits)], contiguous.
        bits: code width, 1 to 8.
        values: number of codes in each row.

    Returns:
        uint8 [rows, values].
    """
    stream = packed.view(torch.uint8)
    rows = stream.shape[0]
    per_unit, unit_bytes = 8 // gcd(bits, 8), bits // gcd(bits, 8)
    units = -(-values // per_unit)
    missing = units * unit_bytes - stream.shape[1]
    if missing > 0:
        stream = torch.nn.functional.pad(stream, (0, missing))
    stream = stream[:, : units * unit_bytes].reshape(rows, units, unit_bytes)
    shifts = torch.arange(per_unit, device=packed.device, dtype=torch.int32) * bits
    if unit_bytes == 1:
        codes = (stream >> shifts.to(torch.uint8)) & (2**bits - 1)
    else:
        unit = torch.zeros(rows, units, dtype=torch.int64, device=packed.device)
        for byte in range(unit_bytes):
            unit |= stream[:, :, byte].to(torch.int64) << (8 * byte)
        codes = ((unit.unsqueeze(-1) >> shifts) & (2**bits - 1)).to(torch.uint8)
    unpacked: Tensor = codes.reshape(rows, units * per_unit)[:, :values]
    return unpacked


def contiguous_transpose(packed: Tensor) -> Tensor:
    """Return a copy of the transpose whose last axis has stride 1, also if an axis has length 1."""
    return packed.t().clone(memory_format=torch.contiguous_format)


def unpack_positions(packed: Tensor, bits: int, positions: Tensor) -> Tensor:
    """Return the codes at some positions of each row.

    Args:
        packed: int32 [rows, word_count(values, bits)], contiguous.
        bits: code width, 1 to 8.
        positions: int64 [n], each below the number of codes in a row.

    Returns:
        uint8 [rows, n].
    """
    # a code may end in the byte after the one in which it begins
    stream = torch.nn.functional.pad(packed.view(torch.uint8), (0, 1))
    first, shift = positions * bits // 8, positions * bits % 8
    pair = stream[:, first].to(torch.int32) | stream[:, first + 1].to(torch.int32) << 8
    codes: Tensor = (pair >> shift) & (2**bits - 1)
    return codes.to(torch.uint8)
