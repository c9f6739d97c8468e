"""Products with packed weights on a processor; no more than a tile of the weight is there at once.

A row is multiplied by codes that are expanded in registers, some rows by pieces that fit into the
nearest cache, many rows by tiles for the larger ones, that torch multiplies.
"""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from quantizer.kernels import numba_matmul
from quantizer.kernels.precision import fastest_matmul_dtype, matmul_dtype
from quantizer.modules.tensor_cache import TensorCache
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

SINGLE_ROWS, FEW_ROWS = 3, 16
"""Up to so many rows it is fastest to expand every code in registers, for each row anew.

And in small pieces, for all rows.
"""
TILE_BYTES = 2**26
"""What the weights of a tile take in float32.

Of long rows a smaller tile has few outputs, which are slow to multiply.
"""
SHARED_PRODUCT, SHARED_TILE = 2**21, 2**21
"""Weights from which on threads share a product with few rows, or the making of a tile.

Below, waking them takes longer.
"""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Layer:
    """The stored tensors of one layer as the loops take them.

    Attributes:
        columns: input column at each stored position, int64 [in].
        parts: columns and tensors of each part, in stored order.
        outliers: row starts, columns, values; or None.
        adapter: float32 [rank, in] in the layer's own order of columns and [out, rank]; or None.
    """

    columns: Tensor
    parts: list[tuple[int, numba_matmul.Part]]
    outliers: tuple[Any, Any, Any] | None
    adapter: tuple[Tensor, Tensor] | None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], fidelity: Fidelity, in_features: int) -> "_Layer":
        """View stored tensors, without copying codes."""
        parts = [
            (columns, _part(tensors, name, bits, fidelity))
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
        out, stored = torch.zeros(len(rows), out_features), rows[:, self.columns]
        inputs, outputs, some = (
            rows.numpy(),
            out.numpy(),
            torch.split(stored, [columns for columns, _ in self.parts], dim=1),
        )
        pieces = [
            (part, x.contiguous().numpy()) for (_, part), x in zip(self.parts, some, strict=True)
        ]

        def work(border: tuple[int, int]) -> None:
            first, last = border
            results = outputs[:, first:last]
            for part, x in pieces:
                if len(rows) > SINGLE_ROWS:
                    numba_matmul.multiply_rows(part, x, border, outputs)
                else:
                    for row, sums in zip(x, results, strict=True):
                        numba_matmul.multiply(part, row, first, sums)
            if self.outliers is not None:
                for row, sums in zip(inputs, results, strict=True):
                    numba_matmul.multiply_outliers(*self.outliers, row, first, sums)

        threads = _threads(out_features * rows.shape[1] >= SHARED_PRODUCT)
        size = -(-out_features // threads // numba_matmul.UNIT) * numba_matmul.UNIT
        _each(
            work,
            [(first, min(first + size, out_features)) for first in range(0, out_features, size)],
            threads,
        )
        if self.adapter is not None:
            a, b = self.adapter
            out += rows @ a.t() @ b.t()
        return out

    def multiply_tiles(self, rows: Tensor, out_features: int) -> Tensor:
        """Return the product with many rows, [rows, in] to [rows, out], tile by tile.

        It is in bfloat16 where rows are and the processor multiplies that itself; else in float32,
        which is then many times faster.
        """
        count, in_features = rows.shape
        rows = rows.to(
            fastest_matmul_dtype("cpu") if rows.dtype == torch.bfloat16 else torch.float32
        )
        out = rows.new_empty(count, out_features)
        outputs = max(1, TILE_BYTES // (4 * in_features) // numba_matmul.UNIT) * numba_matmul.UNIT
        plain = self.outliers is None and self.adapter is None
        buffer = _buffer(
            in_features * min(outputs, out_features), rows.dtype if plain else torch.float32
        )
        for first in range(0, out_features, outputs):
            last = min(first + outputs, out_features)
            tile = buffer[: in_features * (last - first)].view(in_features, last - first)
            self._expand(tile, first)
            if self.outliers is not None:
                numba_matmul.add_outliers(*self.outliers, first, tile.numpy())
            if self.adapter is not None:
                a, b = self.adapter
                tile += a.t() @ b[first:last].t()
            torch.mm(rows, tile.to(rows.dtype), out=out[:, first:last])
        return out

    def _expand(self, tile: Tensor, first: int) -> None:
        """Write the dense weights of the outputs from `first` on, in float32 or rounded to bfloat16, to a tile [in, outputs]."""
        rounded = tile.dtype == torch.bfloat16
        write, target = (
            (numba_matmul.expand_rounded, tile.view(torch.uint16))
            if rounded
            else (numba_matmul.expand, tile)
        )
        array, columns, start, pieces = target.numpy(), self.columns.numpy(), 0, []
        threads = _threads(tile.numel() >= SHARED_TILE)
        for width, part in self.parts:
            size = -(-len(part[3]) // threads)
            groups = [(at, min(at + size, len(part[3]))) for at in range(0, len(part[3]), size)]
            pieces += [(part, columns[start : start + width], some) for some in groups]
            start += width
        _each(lambda piece: write(*piece, first, array), pieces, threads)


def matmul(
    hidden_states: Tensor,
    tensors: Mapping[str, Tensor],
    fidelity: Fidelity,
    out_features: int,
    bias: Tensor | None,
    cache: TensorCache | None = None,
) -> Tensor:
    """Return hidden_states @ W' + bias, see `quantizer.modules.matmul.matmul`; without gradients.

    Weights are exact and sums in float32, but for many rows in bfloat16, or in a context that has
    products in it, on a processor that multiplies it: there weights are rounded to bfloat16 first,
    as in `quantizer.modules.matmul_reference`.
    """
    rows = hidden_states.detach().reshape(-1, hidden_states.shape[-1])
    layer = (cache or TensorCache()).get(
        tensors, lambda: _Layer.of(tensors, fidelity, rows.shape[1])
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
    """Make what products share before there are any.

    Among their results it would keep memory from being given back.
    """
    cache.get(tensors, lambda: _Layer.of(tensors, fidelity, in_features))


def _part(
    tensors: Mapping[str, Tensor], name: str, bits: int, fidelity: Fidelity
) -> numba_matmul.Part:
    codes, zeros = _words(tensors[f"{name}_codes"]), _words(tensors[f"{name}_zeros"])
    if fidelity.scale_bits == SCALE_BITS[0]:
        scales = (
            tensors[f"{name}_scales"].half().view(torch.uint16).numpy()
        )  # a module may have been cast
        return bits, fidelity.group_size, codes, zeros, scales, _NO_WORDS, 0, _NO_UNIT
    unit = scale_unit(tensors[ROW_SCALES].float(), fidelity, bits).numpy()
    return (
        bits,
        fidelity.group_size,
        codes,
        zeros,
        _NO_SCALES,
        _words(tensors[f"{name}_scale_codes"]),
        fidelity.scale_bits,
        unit,
    )


_NO_WORDS, _NO_SCALES, _NO_UNIT = (
    np.empty((0, 0), np.uint32),
    np.empty((0, 0), np.uint16),
    np.empty(0, np.float32),
)


def _words(tensor: Tensor) -> Any:
    return tensor.numpy().view(np.uint32)


_BUFFERS = threading.local()


def _buffer(count: int, dtype: torch.dtype) -> Tensor:
    """Return memory for a tile that this thread keeps.

    Fresh memory costs more than what is written to it.
    """
    size = count * dtype.itemsize
    if getattr(_BUFFERS, "memory", None) is None or _BUFFERS.memory.numel() < size:
        _BUFFERS.memory = torch.empty(max(size, TILE_BYTES), dtype=torch.uint8)
    memory: Tensor = _BUFFERS.memory[:size].view(dtype)
    return memory


def _threads(worthwhile: bool) -> int:
    return torch.get_num_threads() if worthwhile else 1


def _each(work: Callable[[T], None], items: Sequence[T], threads: int) -> None:
    """Do the work on every item, on some threads."""
    if threads == 1:
        for item in items:
            work(item)
    else:
        list(_pool(os.getpid(), threads).map(work, items))


@cache
def _pool(_: int, threads: int) -> ThreadPoolExecutor:
    """Return the threads of a process; a forked one has none of its parent's."""
    return ThreadPoolExecutor(threads, thread_name_prefix="bitwright-kernel")
