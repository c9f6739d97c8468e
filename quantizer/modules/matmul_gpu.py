"""Products with packed weights on a GPU, by Triton kernels.

Up to `FUSED_ROWS` rows are multiplied in one launch, both parts and the column order included. For
more rows, which share the work of dequantizing a weight, a kernel writes tiles of the weight and
PyTorch multiplies them.
"""

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import torch
import triton
from torch import Tensor

from quantizer.kernels import triton_kernels, triton_parts
from quantizer.kernels.triton_parts import TileShape
from quantizer.packed.layout import (
    ADAPTER_A,
    ADAPTER_B,
    COLUMNS,
    OUTLIER_COLUMNS,
    OUTLIER_STARTS,
    OUTLIER_VALUES,
    PART_NAMES,
    ROW_SCALES,
    named_parts,
)
from quantizer.plans.fidelity import SCALE_BITS, Fidelity

ROW_TILES = (16, 64)
"""Rows of a program: as many as a matrix instruction takes, or four times as many."""
FUSED_ROWS = 64
"""Up to so many rows are multiplied in one launch."""
TILE_BYTES = 2**26
PROGRAMS_PER_PROCESSOR = 2
"""A product is split into at least so many programs for each of the GPU's processors."""

CANDIDATES = tuple(
    TileShape(units, outputs, warps)
    for units in (16, 32)
    for outputs in (32, 64, 128)
    for warps in (4, 8)
)
"""Tile shapes among which the fastest is searched."""
SEARCH_MS = {"warmup": 5, "rep": 20}
"""How long each candidate is timed."""
_WIDEST = max(tiles.outputs for tiles in CANDIDATES)


def matmul(
    hidden_states: Tensor,
    tensors: Mapping[str, Tensor],
    fidelity: Fidelity,
    out_features: int,
    bias: Tensor | None,
) -> Tensor:
    """Return hidden_states @ W' + bias, see `quantizer.modules.matmul.matmul`; without gradients.

    A single row is multiplied by exact weights; for more rows they are rounded to the dtype of
    hidden_states. Sums are in float32.
    """
    rows = hidden_states.detach().reshape(-1, hidden_states.shape[-1])
    if not len(rows):  # a launch of no programs is an error
        return hidden_states.new_empty(*hidden_states.shape[:-1], out_features)
    multiply = multiply_fused if len(rows) <= FUSED_ROWS else multiply_tiles
    out = multiply(rows, tensors, fidelity, out_features).float()
    if fidelity.outlier_share:
        out += _outlier_products(rows.float(), tensors, out_features)
    if fidelity.adapter_rank:
        out += rows.float() @ tensors[ADAPTER_A].float().t() @ tensors[ADAPTER_B].float().t()
    if bias is not None:
        out += bias
    return out.to(hidden_states.dtype).view(*hidden_states.shape[:-1], out_features)


def multiply_fused(
    rows: Tensor,
    tensors: Mapping[str, Tensor],
    fidelity: Fidelity,
    out_features: int,
    tiles: TileShape | None = None,
) -> Tensor:
    """Return the product of the packed codes with any number of rows above 0, in one launch.

    Args:
        rows: [rows, in], contiguous in a row.
        tensors: see `quantizer.packed.weight.QuantizedWeight`.
        fidelity: how they are stored.
        out_features: rows of the weight.
        tiles: tile shape; None for the fastest of `CANDIDATES`, which is searched once for each
            GPU, shape and fidelity. Triton keeps the result on disk.

    Returns:
        float32 [rows, out], without outliers and adapter.
    """
    count, in_features = rows.shape
    split = _split(out_features, rows.device)
    out = torch.empty(split, count, out_features, dtype=torch.float32, device=rows.device)
    pointers, sizes, constants = _arguments(tensors, fidelity, out_features, in_features)
    mode = triton_parts.MULTIPLY_ROW if count == 1 else triton_parts.MULTIPLY_ROWS
    row_tile = next((size for size in ROW_TILES if count <= size), ROW_TILES[-1])
    kernel, chosen = _launch(triton_kernels.fused_kernel, tiles)
    kernel[
        lambda meta: (
            triton.cdiv(out_features, meta["OUTPUTS"]),
            split,
            triton.cdiv(count, row_tile),
        )
    ](
        rows,
        out,
        *pointers,
        count,
        *sizes,
        rows.stride(0),
        **constants,
        MODE=mode.value,  # the search writes it to disk
        ROWS=row_tile,
        SPLIT=split,
        **chosen,
    )
    return out.sum(0) if split > 1 else out[0]


def multiply_tiles(
    rows: Tensor,
    tensors: Mapping[str, Tensor],
    fidelity: Fidelity,
    out_features: int,
    tiles: TileShape | None = None,
) -> Tensor:
    """Return the product of the packed codes with any number of rows, tile by tile.

    Args:
        rows: [rows, in], contiguous in a row.
        tensors: see `quantizer.packed.weight.QuantizedWeight`.
        fidelity: how they are stored.
        out_features: rows of the weight.
        tiles: tile shape; see `multiply_fused`.

    Returns:
        [rows, out] in the dtype of the rows, without outliers and adapter.
    """
    count, in_features = rows.shape
    out = torch.empty(count, out_features, dtype=rows.dtype, device=rows.device)
    outputs = max(1, TILE_BYTES // (rows.element_size() * in_features) // _WIDEST) * _WIDEST
    tile = torch.empty(
        in_features, min(outputs, out_features), dtype=rows.dtype, device=rows.device
    )
    pointers, sizes, constants = _arguments(tensors, fidelity, out_features, in_features)
    kernel, chosen = _launch(triton_kernels.dequantize_kernel, tiles)
    for first in range(0, out_features, outputs):
        last = min(first + outputs, out_features)
        split = _split(last - first, rows.device)
        kernel[
            lambda meta, width=last - first, split=split: (
                triton.cdiv(width, meta["OUTPUTS"]),
                split,
            )
        ](tile, *pointers, *sizes, first, tile.stride(0), **constants, SPLIT=split, **chosen)
        torch.mm(rows, tile[:, : last - first], out=out[:, first:last])
    return out


def _arguments(
    tensors: Mapping[str, Tensor], fidelity: Fidelity, out_features: int, in_features: int
) -> tuple[list[Tensor], tuple[int, int, int], dict[str, int]]:
    """Return the pointers, sizes and constants that both kernels take."""
    names = [name for name, _, _ in named_parts(fidelity, in_features)]
    coded = fidelity.scale_bits < SCALE_BITS[0]
    scales = "scale_codes" if coded else "scales"
    pointers = [tensors[COLUMNS]]
    for name in PART_NAMES:
        stored = name if name in names else names[-1]  # an empty part is not read
        pointers += [tensors[f"{stored}_{leaf}"] for leaf in ("codes", "zeros", scales)]
    pointers.append(tensors[ROW_SCALES if coded else f"{names[-1]}_scales"])
    constants = {
        "HIGH_BITS": fidelity.bits_hi,
        "LOW_BITS": fidelity.bits_lo,
        "GROUP_UNITS": fidelity.group_size // 32,
        "SCALE_BITS": fidelity.scale_bits,
    }
    return pointers, (in_features, out_features, fidelity.high_columns(in_features)), constants


def _split(outputs: int, device: torch.device) -> int:
    """Return the number of shares of columns that gives every processor of the GPU work."""
    processors = (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 1
    )
    return max(1, min(8, PROGRAMS_PER_PROCESSOR * processors * 64 // max(outputs, 1)))


def _launch(kernel: Any, tiles: TileShape | None) -> tuple[Any, dict[str, int]]:
    """Return the kernel to launch, and the arguments that state its tile shape."""
    if tiles is None:
        return _autotuned(kernel), {}
    return kernel, {"UNITS": tiles.units, "OUTPUTS": tiles.outputs, "num_warps": tiles.warps}


@cache
def _autotuned(kernel: Any) -> Any:
    """Return the kernel with a search over `CANDIDATES`."""
    configs = [
        triton.Config({"UNITS": each.units, "OUTPUTS": each.outputs}, num_warps=each.warps)
        for each in CANDIDATES
    ]
    key = [
        "inputs",
        "outputs",
        "high_count",
        "HIGH_BITS",
        "LOW_BITS",
        "GROUP_UNITS",
        "SCALE_BITS",
        "SPLIT",
    ]
    key += [name for name in ("MODE", "ROWS") if name in kernel.arg_names]
    bench = partial(triton.testing.do_bench, **SEARCH_MS)
    return triton.autotune(configs, key=key, do_bench=bench, cache_results=True)(kernel)


def _outlier_products(rows: Tensor, tensors: Mapping[str, Tensor], out_features: int) -> Tensor:
    starts, values = tensors[OUTLIER_STARTS].to(torch.int64), tensors[OUTLIER_VALUES].float()
    outputs = torch.arange(out_features, device=rows.device).repeat_interleave(
        starts.diff(), output_size=values.numel()
    )
    indices = torch.stack([outputs, tensors[OUTLIER_COLUMNS].to(torch.int64)])
    sparse = torch.sparse_coo_tensor(
        indices, values, (out_features, rows.shape[1]), check_invariants=False, is_coalesced=True
    )
    return (sparse @ rows.t()).t()
