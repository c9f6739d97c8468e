"""Packing codes on a GPU by a Triton kernel."""

import torch
import triton
from torch import Tensor

from quantizer.kernels import triton_kernels
from quantizer.kernels.triton_kernels import TileShape
from quantizer.plans.fidelity import word_count

PACKED = TileShape(4, 64, 4)
"""How packing is cut: memory is what it waits for."""


def pack_part(values: Tensor, bits: int) -> Tensor:
    """Round values to codes and pack them in one launch, see `quantizer.packed.rounded_packing.pack_part`."""
    outputs, columns = values.shape
    values = values if values.stride(1) == 1 else values.contiguous()
    packed = torch.empty(
        word_count(columns, bits), outputs, dtype=torch.int32, device=values.device
    )
    grid = triton.cdiv(columns, 32 * PACKED.units), triton.cdiv(outputs, PACKED.outputs)
    triton_kernels.pack_kernel[grid](
        values, packed, columns, outputs, values.stride(0), BITS=bits, UNITS=PACKED.units, OUTPUTS=PACKED.outputs,
        num_warps=PACKED.warps,
    )  # fmt: skip
    return packed
