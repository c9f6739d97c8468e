"""Rounding weights to codes and packing these, in one step."""

import torch
from torch import Tensor

from quantizer.kernels.path import GPU, choose_kernel_path
from quantizer.packed.packing import contiguous_transpose, pack


def pack_part(values: Tensor, bits: int) -> Tensor:
    """Return the packed codes of a part, as they are stored.

    Args:
        values: weight / scale + zero point, or codes, float32 [out, columns]. They are rounded half
            to even and clipped to 0 .. 2**bits - 1.
        bits: code width, 2, 3, 4 or 8.

    Returns:
        int32 [word_count(columns, bits), out], see `quantizer.packed.weight.QuantizedWeight`.
    """
    if choose_kernel_path(values.device.type).name == GPU:
        from quantizer.kernels import triton_packing  # noqa: PLC0415  Triton may be missing

        return triton_packing.pack_part(values, bits)
    return pack_part_reference(values, bits)


def pack_part_reference(values: Tensor, bits: int) -> Tensor:
    """Do what `pack_part` does, in plain PyTorch; the tests compare the kernel with it."""
    return contiguous_transpose(pack(values.round().clamp(0, 2**bits - 1).to(torch.uint8), bits))
