"""Slow exact references of packing, scales, outliers and dequantization, by their definitions."""

import numpy as np
from torch import Tensor

from quantizer.packed.layout import named_parts
from quantizer.packed.weight import QuantizedWeight


def pack_slowly(codes: list[int], bits: int) -> bytes:
    """Pack one row by the definition.

    Code i at bits i*b .. of one little-endian integer, padded to 32-bit words.
    """
    stream = sum(code << (index * bits) for index, code in enumerate(codes))
    return stream.to_bytes(-(-len(codes) * bits // 32) * 4, "little")


def unpack_slowly(row: Tensor, bits: int, values: int) -> list[int]:
    """Read one row of int32 words back by the definition."""
    stream = int.from_bytes(
        b"".join(word.to_bytes(4, "little", signed=True) for word in row.tolist()), "little"
    )
    return [(stream >> (index * bits)) & (2**bits - 1) for index in range(values)]


def scales_slowly(weight: QuantizedWeight, name: str, bits: int) -> list[list[float]]:
    """Return the scales of a part by the definition, [groups][out]."""
    fidelity = weight.fidelity
    if fidelity.scale_bits == 16:
        scales: list[list[float]] = weight.tensors[f"{name}_scales"].tolist()
        return scales
    units = [
        row_scale / 2 ** (bits - fidelity.bits_lo)
        for row_scale in weight.tensors["row_scales"].tolist()
    ]
    codes = [
        unpack_slowly(row, fidelity.scale_bits, weight.out_features)
        for row in weight.tensors[f"{name}_scale_codes"]
    ]
    return [[unit * code for unit, code in zip(units, group, strict=True)] for group in codes]


def outliers_slowly(weight: QuantizedWeight) -> dict[tuple[int, int], float]:
    """Return the outliers by row and column."""
    if not weight.fidelity.outlier_share:
        return {}
    values, columns, starts = (
        weight.tensors[f"outlier_{name}"].tolist() for name in ("values", "columns", "starts")
    )
    return {
        (out, columns[at]): values[at]
        for out in range(weight.out_features)
        for at in range(starts[out], starts[out + 1])
    }


def dequantize_slowly(weight: QuantizedWeight) -> list[list[float]]:
    """Return the weight by plain loops over the stored tensors.

    Each sum and product is rounded to float32.
    """
    columns = [int(column) for column in weight.tensors["columns"].tolist()]
    dense = [[float("nan")] * weight.in_features for _ in range(weight.out_features)]
    start = 0
    for name, count, bits in named_parts(weight.fidelity, weight.in_features):
        scales = scales_slowly(weight, name, bits)
        zeros = [
            unpack_slowly(row, bits, weight.out_features) for row in weight.tensors[f"{name}_zeros"]
        ]
        for out, row in enumerate(weight.tensors[f"{name}_codes"].t()):
            for position, code in enumerate(unpack_slowly(row, bits, count)):
                group = position // weight.fidelity.group_size
                dense[out][columns[start + position]] = float(
                    np.float32(scales[group][out] * (code - zeros[group][out]))
                )
        start += count
    for (out, column), value in outliers_slowly(weight).items():
        dense[out][column] = float(np.float32(dense[out][column] + value))
    if weight.fidelity.adapter_rank:
        a, b = weight.tensors["adapter_a"].tolist(), weight.tensors["adapter_b"].tolist()
        for out in range(weight.out_features):
            for column in range(weight.in_features):
                product = float(np.float32(sum(b[out][k] * a[k][column] for k in range(len(a)))))
                dense[out][column] = float(np.float32(dense[out][column] + product))
    return dense
