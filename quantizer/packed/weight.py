"""A linear layer's weight in stored form.

Packed codes, scales, zero points, column order, and what options add to them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

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
    TensorSpec,
    column_dtype,
    named_parts,
    tensor_specs,
)
from quantizer.packed.outliers import Outliers, add_outliers
from quantizer.packed.packing import contiguous_transpose, pack, unpack, unpack_positions
from quantizer.packed.rounded_packing import pack_part
from quantizer.packed.scales import scale_codes, scale_unit
from quantizer.plans.fidelity import SCALE_BITS, Fidelity


@dataclass(frozen=True, slots=True)
class PartCodes:
    """Result of quantizing one part, before packing.

    Attributes:
        codes: integers as floats, [out, columns of the part], in stored order.
        scale: float32, [groups, out]; representable in 16 bits, or coded under the layer's row
            scales.
        zero: integers as floats, [groups, out].
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """The stored tensors of one layer.

    Names and shapes for a part with c columns of width b, g = ceil(c / group_size), n =
    out_features: `<part>_codes` int32 [word_count(c, b), n], `<part>_scales` float16 [g, n],
    `<part>_zeros` int32 [g, word_count(n, b)], part being `high` or `low`; and `columns` [in], the input
    column at each stored position, uint16 or int32. Codes are packed along the input and lie output
    by output: what a kernel reads of one word, scale or zero point for neighbouring outputs is
    contiguous.

    With scales of s < 16 bits, `<part>_scales` gives way to `<part>_scale_codes` int32 [g, word_count(n,
    s)], and `row_scales` float16 [n] is added: scale = row scale * 2**(bits_lo - b) * code, see
    `quantizer.packed.scales`. With outliers come `outlier_values` float16 [count], `outlier_columns`
    [count] of the dtype of `columns`, `outlier_starts` int32 [n + 1], see `quantizer.packed.outliers`; with
    an adapter of rank r `adapter_a` float16 [r, in] and `adapter_b` float16 [n, r]. Both refer to
    the layer's own order of columns. The weight is dense + outliers + adapter_b @ adapter_a, added
    in this order in float32.
    """

    fidelity: Fidelity
    out_features: int
    in_features: int
    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        """Refuse tensors that do not make up such a layer."""
        expected = tensor_specs(self.fidelity, self.out_features, self.in_features)
        found = {
            name: TensorSpec(tuple(tensor.shape), tensor.dtype)
            for name, tensor in self.tensors.items()
        }
        if found != expected:
            raise CheckpointError(
                f"stored tensors {found} do not make a {self.fidelity.name} layer; expected "
                f"{expected}"
            )

    @classmethod
    def from_codes(
        cls,
        fidelity: Fidelity,
        columns: Tensor,
        parts: tuple[PartCodes, ...],
        row_scale: Tensor | None = None,
        outliers: Outliers | None = None,
    ) -> "QuantizedWeight":
        """Pack a layer of a fidelity without an adapter.

        Args:
            fidelity: how it is stored.
            columns: the column order, [in].
            parts: in stored order.
            row_scale: float32 representable in 16 bits, [out]; for scales of fewer than 16 bits.
            outliers: for a fidelity with outliers.

        Raises:
            CheckpointError: what is given does not make up such a layer.
        """
        in_features, out_features = columns.numel(), parts[0].codes.shape[0]
        tensors = {COLUMNS: columns.to(column_dtype(in_features))}
        for (name, _, bits), part in zip(named_parts(fidelity, in_features), parts, strict=True):
            tensors[f"{name}_codes"] = pack_part(part.codes, bits)
            if row_scale is None:
                tensors[f"{name}_scales"] = part.scale.half()
            else:
                codes = scale_codes(part.scale, scale_unit(row_scale, fidelity, bits)).to(
                    torch.uint8
                )
                tensors[f"{name}_scale_codes"] = pack(codes, fidelity.scale_bits)
            tensors[f"{name}_zeros"] = pack(part.zero.to(torch.uint8), bits)
        if row_scale is not None:
            tensors[ROW_SCALES] = row_scale.half()
        if outliers is not None:
            tensors[OUTLIER_VALUES] = outliers.values
            tensors[OUTLIER_COLUMNS] = outliers.columns.to(column_dtype(in_features))
            tensors[OUTLIER_STARTS] = outliers.starts.to(torch.int32)
        return cls(fidelity, out_features, in_features, tensors)

    def parts(self) -> tuple[PartCodes, ...]:
        """Return the parts that `from_codes` packed, in stored order."""
        found = []
        for name, columns, bits in named_parts(self.fidelity, self.in_features):
            codes = unpack(contiguous_transpose(self.tensors[f"{name}_codes"]), bits, columns)
            zero = unpack(self.tensors[f"{name}_zeros"], bits, self.out_features)
            scale = _part_scales(self.tensors, name, bits, self.fidelity, self.out_features)
            found.append(PartCodes(codes.float(), scale, zero.float()))
        return tuple(found)

    @property
    def row_scale(self) -> Tensor | None:
        """What scales of few bits are coded under, float32 [out].

        None where scales have 16 bits.
        """
        return (
            self.tensors[ROW_SCALES].float() if self.fidelity.scale_bits < SCALE_BITS[0] else None
        )

    @property
    def outliers(self) -> Outliers | None:
        """The weights that are kept beside the grid, if any are."""
        if not self.fidelity.outlier_share:
            return None
        columns, starts = (
            self.tensors[OUTLIER_COLUMNS].to(torch.int64),
            self.tensors[OUTLIER_STARTS].to(torch.int64),
        )
        return Outliers(self.tensors[OUTLIER_VALUES], columns, starts)

    @property
    def adapter(self) -> Adapter | None:
        """The low-rank adapter, if there is one."""
        return (
            Adapter(self.tensors[ADAPTER_A], self.tensors[ADAPTER_B])
            if self.fidelity.adapter_rank
            else None
        )

    def with_adapter(self, rank: int, adapter: Adapter) -> "QuantizedWeight":
        """Return the same layer with an adapter of the nominal rank `rank`, for one that has none."""
        tensors = {**self.tensors, ADAPTER_A: adapter.a, ADAPTER_B: adapter.b}
        return QuantizedWeight(
            replace(self.fidelity, adapter_rank=rank), self.out_features, self.in_features, tensors
        )

    def to(self, device: torch.device | str) -> "QuantizedWeight":
        """Return the same layer with its tensors on a device."""
        return replace(
            self, tensors={name: tensor.to(device) for name, tensor in self.tensors.items()}
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of the stored tensors; equal to `Fidelity.weight_bytes`."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight [out, in], computed in float32 and rounded once to `dtype`."""
        return dequantize_tensors(
            self.tensors, self.fidelity, self.out_features, self.in_features, dtype
        )


def check_indices(
    layer: str, tensors: Mapping[str, Tensor], out_features: int, in_features: int
) -> None:
    """Refuse stored numbers that point outside a layer; tensors without storage are let pass.

    Raises:
        CheckpointError: columns are no permutation, or outliers are not where they can be.
    """
    columns = tensors[COLUMNS]
    if columns.is_meta:
        return
    found = columns.to(torch.int64).sort().values
    if not torch.equal(found, torch.arange(in_features, device=found.device)):
        raise CheckpointError(
            f"layer {layer!r}: the column order is no permutation of {in_features} columns; get "
            "its files anew"
        )
    if OUTLIER_STARTS not in tensors:
        return
    starts, places = (
        tensors[OUTLIER_STARTS].to(torch.int64),
        tensors[OUTLIER_COLUMNS].to(torch.int64),
    )
    whole = (
        int(starts[0]) == 0 and int(starts[-1]) == len(places) and bool((starts.diff() >= 0).all())
    )
    if not whole or bool(((places < 0) | (places >= in_features)).any()):
        raise CheckpointError(
            f"layer {layer!r}: outliers lie outside its {out_features} x {in_features} weights; "
            "get its files anew"
        )


def dequantize_tensors(
    tensors: Mapping[str, Tensor],
    fidelity: Fidelity,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the weight [out, in] that the stored tensors stand for; see `QuantizedWeight`."""
    parts = []
    for name, count, bits in named_parts(fidelity, in_features):
        codes = unpack(contiguous_transpose(tensors[f"{name}_codes"]), bits, count)
        scale = _part_scales(tensors, name, bits, fidelity, out_features)
        zero = unpack(tensors[f"{name}_zeros"], bits, out_features)
        group = torch.arange(count, device=codes.device) // fidelity.group_size
        parts.append(
            dequantize(codes.t().float(), scale[group], zero.float()[group])
        )  # [columns, out]
    stored = torch.cat(parts) if len(parts) > 1 else parts[0]
    weight = torch.empty_like(stored)
    weight[tensors[COLUMNS].to(torch.int64)] = stored
    weight = weight.t()
    if fidelity.outlier_share:
        columns = tensors[OUTLIER_COLUMNS].to(torch.int64)
        add_outliers(
            weight,
            Outliers(tensors[OUTLIER_VALUES], columns, tensors[OUTLIER_STARTS].to(torch.int64)),
        )
    if fidelity.adapter_rank:
        weight = weight + adapter_weight(Adapter(tensors[ADAPTER_A], tensors[ADAPTER_B]))
    return weight.to(dtype)


def dequantize_rows(
    tensors: Mapping[str, Tensor], fidelity: Fidelity, in_features: int, rows: Tensor
) -> Tensor:
    """Return some rows of what `dequantize_tensors` returns, for a fidelity without outliers and adapter.

    Args:
        tensors: see `QuantizedWeight`.
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


def _part_scales(
    tensors: Mapping[str, Tensor], name: str, bits: int, fidelity: Fidelity, out_features: int
) -> Tensor:
    """Return the scales of a part, float32 [groups, out]."""
    if fidelity.scale_bits == SCALE_BITS[0]:
        return tensors[f"{name}_scales"].float()
    codes = unpack(tensors[f"{name}_scale_codes"], fidelity.scale_bits, out_features)
    return scale_unit(tensors[ROW_SCALES].float(), fidelity, bits) * codes.float()
