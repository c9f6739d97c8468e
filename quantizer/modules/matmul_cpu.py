"""Products with packed weights on a CPU; no more than one tile of the weight is expanded at a time.

Up to `SINGLE_ROWS` rows are multiplied by codes that are unpacked in registers, up to `FEW_ROWS` by
pieces that fit into the L1 cache. More rows are multiplied by PyTorch, tile by tile.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantizer.kernels import numba_matmul
from quantizer.kernels.precision import fastest_matmul_dtype, matmul_dtype
from quantizer.modules.tensor_cache import TensorCache
from quantizer.modules.threads import run_on_threads, thread_count
from quantizer.packed.layout import (
    ADAPTER_A,
    ADAPTER_B,
    COLUMNS,
    OUTLIER_COLUMNS,
    OUTLIER_STARTS,
    OUTLIER_VALUES,
    ROW_SCALES,
    named_parts,
)
from quantizer.packed.scales import scale_unit
from quantizer.plans.fidelity import SCALE_BITS, Fidelity

SINGLE_ROWS = 3
"""Up to so many rows it is fastest to unpack every code in registers, again for each row."""
FEW_ROWS = 16
"""Up to so many rows it is fastest to unpack small pieces once, for all rows."""
TILE_BYTES = 2**26
"""Size of a tile in float32.

A smaller tile of a wide layer would have few outputs, which are slow to multiply.
"""
SHARED_PRODUCT = 2**21
"""Products of few rows use several threads from so many weights on.

Below, waking threads takes longer than the product.
"""
SHARED_TILE = 2**21
"""Tiles are dequantized on several threads from so many weights on."""


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """The stored tensors of one layer as the compiled loops take them.

    Attributes:
        columns: input column at each stored position, int64 [in].
        parts: number of columns and tensors of each part, in stored order.
        outliers: row starts, columns and values; or None.
        adapter: float32 [rank, in] in the layer's own order of columns, and [out, rank]; or None.
    """

    columns: Tensor
    parts: list[tuple[int, numba_matmul.PackedPart]]
    outliers: tuple[Any, Any, Any] | None
    adapter: tuple[Tensor, Tensor] | None

    @classmethod
    def of(
        cls, tensors: Mapping[str, Tensor], fidelity: Fidelity, in_features: int
    ) -> "PackedLayer":
        """Return a view of stored tensors; codes are not copied."""
        parts = [
            (columns, _packed_part(tensors, name, bits, fidelity))
            for name, columns, bits in named_parts(fidelity, in_features)
        ]
        outliers = adapter = None
        if fidelity.outlier_share:
            starts, columns = (
                tensors[name].to(torch.int64).numpy() for name in (OUTLIER_STARTS, OUTLIER_COLUMNS)
            )
            outliers = starts, columns, tensors[OUTLIER_VALUES].float().numpy()
        if fidelity.adapter_rank:
            adapter = tensors[ADAPTER_A].float(), tensors[ADAPTER_B].float()
        return cls(tensors[COLUMNS].to(torch.int64), parts, outliers, adapter)

    def multiply(self, rows: Tensor, out_features: int) -> Tensor:
        """Return the product with few rows, float32 [rows, in] to [rows, out]."""
        out = torch.zeros(len(rows), out_features)
        inputs, outputs = rows.numpy(), out.numpy()
        stored = torch.split(rows[:, self.columns], [columns for columns, _ in self.parts], dim=1)
        pairs = [
            (part, x.contiguous().numpy()) for (_, part), x in zip(self.parts, stored, strict=True)
        ]

        def multiply_outputs(border: tuple[int, int]) -> None:
            first, last = border
            results = outputs[:, first:last]
            for part, x in pairs:
                if len(rows) > SINGLE_ROWS:
                    numba_matmul.multiply_rows(part, x, border, outputs)
                else:
                    for row, sums in zip(x, results, strict=True):
                        numba_matmul.multiply(part, row, first, sums)
            if self.outliers is not None:
                for row, sums in zip(inputs, results, strict=True):
                    numba_matmul.multiply_outliers(*self.outliers, row, first, sums)

        threads = thread_count(worthwhile=out_features * rows.shape[1] >= SHARED_PRODUCT)
        size = -(-out_features // threads // numba_matmul.UNIT_CODES) * numba_matmul.UNIT_CODES
        borders = [
            (first, min(first + size, out_features)) for first in range(0, out_features, size)
        ]
        run_on_threads(multiply_outputs, borders, threads)
        if self.adapter is not None:
            a, b = self.adapter
            out += rows @ a.t() @ b.t()
        return out

    def multiply_tiles(self, rows: Tensor, out_features: int) -> Tensor:
        """Return the product with many rows, [rows, in] to [rows, out], tile by tile.

        It is computed in bfloat16 if the rows have that dtype and the CPU has instructions for it;
        else in float32, which is then many times faster.
        """
        count, in_features = rows.shape
        rows = rows.to(
            fastest_matmul_dtype("cpu") if rows.dtype == torch.bfloat16 else torch.float32
        )
        out = rows.new_empty(count, out_features)
        units = TILE_BYTES // (4 * in_features) // numba_matmul.UNIT_CODES
        outputs = max(1, units) * numba_matmul.UNIT_CODES
        plain = self.outliers is None and self.adapter is None
        buffer = _buffer(
            in_features * min(outputs, out_features), rows.dtype if plain else torch.float32
        )
        for first in range(0, out_features, outputs):
            last = min(first + outputs, out_features)
            tile = buffer[: in_features * (last - first)].view(in_features, last - first)
            self.dequantize_tile(tile, first)
            if self.outliers is not None:
                numba_matmul.add_outliers(*self.outliers, first, tile.numpy())
            if self.adapter is not None:
                a, b = self.adapter
                tile += a.t() @ b[first:last].t()
            torch.mm(rows, tile.to(rows.dtype), out=out[:, first:last])
        return out

    def dequantize_tile(self, tile: Tensor, first: int) -> None:
        """Write the dequantized codes of the outputs from `first` on, without outliers and adapter.

        Args:
            tile: float32 or bfloat16 [in, outputs].
            first: first output.
        """
        if tile.dtype == torch.bfloat16:
            write, array = numba_matmul.dequantize_tile_bfloat16, tile.view(torch.uint16).numpy()
        else:
            write, array = numba_matmul.dequantize_tile, tile.numpy()
        threads = thread_count(worthwhile=tile.numel() >= SHARED_TILE)
        columns = self.columns.numpy()
        pieces, start = [], 0
        for width, part in self.parts:
            groups = len(part[3])
            size = -(-groups // threads)
            pieces += [
                (part, columns[start : start + width], (at, min(at + size, groups)))
                for at in range(0, groups, size)
            ]
            start += width
        run_on_threads(lambda piece: write(*piece, first, array), pieces, threads)


def matmul(
    hidden_states: Tensor,
    tensors: Mapping[str, Tensor],
    fidelity: Fidelity,
    out_features: int,
    bias: Tensor | None,
    cache: TensorCache | None = None,
) -> Tensor:
    """Return hidden_states @ W' + bias, see `quantizer.modules.matmul.matmul`; without gradients.

    Weights are exact and sums are in float32. More than `FEW_ROWS` rows in bfloat16, or in a
    context that multiplies in bfloat16, are the exception on a CPU with instructions for it: their
    weights are rounded to bfloat16 first, as in `quantizer.modules.matmul_reference`.
    """
    rows = hidden_states.detach().reshape(-1, hidden_states.shape[-1])
    layer = (cache or TensorCache()).get(
        tensors, lambda: PackedLayer.of(tensors, fidelity, rows.shape[1])
    )
    if len(rows) <= FEW_ROWS:
        out = layer.multiply(rows.float(), out_features)
    else:
        out = layer.multiply_tiles(rows.to(matmul_dtype(rows)), out_features)
    if bias is not None:
        out += bias
    return out.to(hidden_states.dtype).view(*hidden_states.shape[:-1], out_features)


def prepare(
    tensors: Mapping[str, Tensor], fidelity: Fidelity, in_features: int, cache: TensorCache
) -> None:
    """Fill the cache before the first product.

    Allocated between the results of products, the cached value would keep freed memory from being
    returned to the system.
    """
    cache.get(tensors, lambda: PackedLayer.of(tensors, fidelity, in_features))


_NO_WORDS = np.empty((0, 0), np.uint32)
_NO_SCALES = np.empty((0, 0), np.uint16)
_NO_UNIT = np.empty(0, np.float32)


def _packed_part(
    tensors: Mapping[str, Tensor], name: str, bits: int, fidelity: Fidelity
) -> numba_matmul.PackedPart:
    codes, zeros = _words(tensors[f"{name}_codes"]), _words(tensors[f"{name}_zeros"])
    size = fidelity.group_size
    if fidelity.scale_bits == SCALE_BITS[0]:
        # a module may have been cast
        scales = tensors[f"{name}_scales"].half().view(torch.uint16).numpy()
        return bits, size, codes, zeros, scales, _NO_WORDS, 0, _NO_UNIT
    unit = scale_unit(tensors[ROW_SCALES].float(), fidelity, bits).numpy()
    scale_codes = _words(tensors[f"{name}_scale_codes"])
    return bits, size, codes, zeros, _NO_SCALES, scale_codes, fidelity.scale_bits, unit


def _words(tensor: Tensor) -> Any:
    return tensor.numpy().view(np.uint32)


_BUFFERS = threading.local()


def _buffer(count: int, dtype: torch.dtype) -> Tensor:
    """Return memory for `count` numbers of a tile; each thread reuses its own.

    Fresh memory costs more than writing the tile.
    """
    size = count * dtype.itemsize
    if getattr(_BUFFERS, "memory", None) is None or _BUFFERS.memory.numel() < size:
        _BUFFERS.memory = torch.empty(max(size, TILE_BYTES), dtype=torch.uint8)
    memory: Tensor = _BUFFERS.memory[:size].view(dtype)
    return memory
