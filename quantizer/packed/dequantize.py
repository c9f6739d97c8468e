"""From the stored tensors of a layer to its weight; `QuantizedWeight` names the tensors."""

from collections.abc import Mapping

import torch
from torch import Tensor

from quantizer.errors import CheckpointError
from quantizer.packed.adapter import Adapter, adapter_weight
from quantizer.packed.grid import dequantize
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
from quantizer.packed.outliers import Outliers, add_outliers
from quantizer.packed.packing import contiguous_transpose, unpack, unpack_positions
from quantizer.packed.scales import scale_unit
from quantizer.plans.fidelity import SCALE_BITS, Fidelity


def dequantize_tensors(
    tensors: Mapping[str, Tensor],
    fidelity: Fidelity,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the dequantized weight [out, in], computed in float32 and rounded once to `dtype`.

    Args:
        tensors: see `quantizer.packed.weight.QuantizedWeight`; others are ignored.
        fidelity: how they are stored.
        out_features: rows of the weight.
        in_features: columns of the weight.
        dtype: of the result.
    """
    parts = []
    for name, count, bits in named_parts(fidelity, in_features):
        codes = unpack(contiguous_transpose(tensors[f"{name}_codes"]), bits, count)
        scale = part_scales(tensors, name, bits, fidelity, out_features)
        zero = unpack(tensors[f"{name}_zeros"], bits, out_features)
        group = torch.arange(count, device=codes.device) // fidelity.group_size
        parts.append(dequantize(codes.t().float(), scale[group], zero.float()[group]))
    stored = torch.cat(parts) if len(parts) > 1 else parts[0]  # [in, out]
    weight = torch.empty_like(stored)
    weight[tensors[COLUMNS].to(torch.int64)] = stored
    weight = weight.t()
    if fidelity.outlier_share:
        add_outliers(weight, stored_outliers(tensors))
    if fidelity.adapter_rank:
        weight = weight + adapter_weight(Adapter(tensors[ADAPTER_A], tensors[ADAPTER_B]))
    return weight.to(dtype)


def dequantize_rows(
    tensors: Mapping[str, Tensor], fidelity: Fidelity, in_features: int, rows: Tensor
) -> Tensor:
    """Return some rows of the dequantized weight, for a fidelity without outliers and adapter.

    Args:
        tensors: see `quantizer.packed.weight.QuantizedWeight`.
        fidelity: how they are stored.
        in_features: columns of the weight.
        rows: int64 [n].

    Returns:
        float32 [n, in].
    """
    parts = []
    for name, count, bits in named_parts(fidelity, in_features):
        codes = unpack(contiguous_transpose(tensors[f"{name}_codes"][:, rows]), bits, count).float()
        if fidelity.scale_bits == SCALE_BITS[0]:
            scale = tensors[f"{name}_scales"][:, rows].float()
        else:
            unit = scale_unit(tensors[ROW_SCALES][rows].float(), fidelity, bits)
            scale = (
                unit
                * unpack_positions(
                    tensors[f"{name}_scale_codes"], fidelity.scale_bits, rows
                ).float()
            )
        zero = unpack_positions(tensors[f"{name}_zeros"], bits, rows).float()
        group = torch.arange(count, device=codes.device) // fidelity.group_size
        parts.append(dequantize(codes, scale.t()[:, group], zero.t()[:, group]))
    stored = torch.cat(parts, 1)
    weight = torch.empty_like(stored)
    weight[:, tensors[COLUMNS].to(torch.int64)] = stored
    return weight


def check_indices(
    layer: str, tensors: Mapping[str, Tensor], out_features: int, in_features: int
) -> None:
    """Refuse stored column numbers and row starts that point outside a layer.

    Tensors on the meta device pass.

    Args:
        layer: name, for the message.
        tensors: stored tensors by name.
        out_features: rows of the weight.
        in_features: columns of the weight.

    Raises:
        CheckpointError: the column order is not a permutation, or outliers lie outside the weight.
    """
    columns = tensors[COLUMNS]
    if columns.is_meta:
        return
    ordered = columns.to(torch.int64).sort().values
    if not torch.equal(ordered, torch.arange(in_features, device=ordered.device)):
        raise CheckpointError(
            f"layer {layer!r}: the column order is no permutation of {in_features} columns; "
            "download or export the checkpoint again"
        )
    if OUTLIER_STARTS not in tensors:
        return
    outliers = stored_outliers(tensors)
    starts, places = outliers.starts, outliers.columns
    valid = (
        int(starts[0]) == 0 and int(starts[-1]) == len(places) and bool((starts.diff() >= 0).all())
    )
    if not valid or bool(((places < 0) | (places >= in_features)).any()):
        raise CheckpointError(
            f"layer {layer!r}: outliers lie outside its {out_features} x {in_features} weights; "
            "download or export the checkpoint again"
        )


def stored_outliers(tensors: Mapping[str, Tensor]) -> Outliers:
    """Return the outliers in stored tensors."""
    return Outliers(
        tensors[OUTLIER_VALUES],
        tensors[OUTLIER_COLUMNS].to(torch.int64),
        tensors[OUTLIER_STARTS].to(torch.int64),
    )


def part_scales(
    tensors: Mapping[str, Tensor], name: str, bits: int, fidelity: Fidelity, out_features: int
) -> Tensor:
    """Return the scales of a part, float32 [groups, out]."""
    if fidelity.scale_bits == SCALE_BITS[0]:
        return tensors[f"{name}_scales"].float()
    codes = unpack(tensors[f"{name}_scale_codes"], fidelity.scale_bits, out_features)
    return scale_unit(tensors[ROW_SCALES].float(), fidelity, bits) * codes.float()
