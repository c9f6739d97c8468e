"""Packing codes on a GPU by a Triton kernel."""

import torch
import triton
from torch import Tensor

from quantizer.kernels.triton_kernels import pack_kernel
from quantizer.kernels.triton_parts import TileShape
from quantizer.plans.fidelity import word_count

PACKING_TILE = TileShape(units=4, outputs=64, warps=4)
"""The tile of a program; packing is limited by memory, so one shape serves all layers."""


def pack_part(values: Tensor, bits: int) -> Tensor:
    """Round values to codes and pack them in one launch.

    See `quantizer.packed.rounded_packing.pack_part`.
    """
    outputs, columns = values.shape
    values = values if values.stride(1) == 1 else values.contiguous()
    packed = torch.empty(
        word_count(columns, bits), outputs, dtype=torch.int32, device=values.device
    )
    grid = (
        triton.cdiv(columns, 32 * PACKING_TILE.units),
        triton.cdiv(outputs, PACKING_TILE.outputs),
    )
    pack_kernel[grid](
        values,
        packed,
        columns,
        outputs,
        values.stride(0),
        BITS=bits,
        UNITS=PACKING_TILE.units,
        OUTPUTS=PACKING_TILE.outputs,
        num_warps=PACKING_TILE.warps,
    )
    return packed
