"""A linear layer's weight as it is stored: packed codes, scales, zero points, options."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantizer.errors import CheckpointError
from quantizer.packed.adapter import Adapter
from quantizer.packed.dequantize import dequantize_tensors, part_scales, stored_outliers
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
from quantizer.packed.outliers import Outliers
from quantizer.packed.packing import contiguous_transpose, pack, unpack
from quantizer.packed.rounded_packing import pack_part
from quantizer.packed.scales import scale_codes, scale_unit
from quantizer.plans.fidelity import SCALE_BITS, Fidelity


@dataclass(frozen=True, slots=True)
class PartCodes:
    """Codes and grids of one part, before packing.

    Attributes:
        codes: integers as floats, in stored order, [out, columns of the part].
        scale: float32 [groups, out], representable in float16 or as a scale code.
        zero: zero points, integers as floats, [groups, out].
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """The stored tensors of one layer.

    For each part (`high`, `low`) of c columns at b bits, with g = ceil(c / group_size) groups and
    n = out_features:

    * `<part>_codes` int32 [word_count(c, b), n]: codes, packed along the input;
    * `<part>_scales` float16 [g, n], or with scales of s < 16 bits `<part>_scale_codes` int32
      [g, word_count(n, s)], packed along the output;
    * `<part>_zeros` int32 [g, word_count(n, b)]: zero points, packed along the output.

    For the layer:

    * `columns` [in]: the input column at each stored position, uint16, or int32 for a layer of more
      than 65,536 columns;
    * `row_scales` float16 [n], with scales of s < 16 bits: scale = row scale * 2**(bits_lo - b) *
      scale code, see `quantizer.packed.scales`;
    * `outlier_values` float16 [count], `outlier_columns` [count] of the dtype of `columns` and
      `outlier_starts` int32 [n + 1], with outliers, see `quantizer.packed.outliers`;
    * `adapter_a` float16 [r, in] and `adapter_b` float16 [n, r], with an adapter of rank r.

    Outliers and adapter refer to the layer's own order of columns. The weight is dense + outliers +
    adapter_b @ adapter_a, added in this order in float32. A kernel reads contiguous words, scales
    and zero points for neighbouring outputs; `quantizer/kernels/README.md` draws this.

    Attributes:
        fidelity: how the layer is stored.
        out_features: rows of the weight.
        in_features: columns of the weight.
        tensors: by name.

    Raises:
        CheckpointError: the tensors are not those of such a layer.
    """

    fidelity: Fidelity
    out_features: int
    in_features: int
    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        """Check names, shapes and dtypes of the tensors."""
        expected = tensor_specs(self.fidelity, self.out_features, self.in_features)
        actual = {
            name: TensorSpec(tuple(tensor.shape), tensor.dtype)
            for name, tensor in self.tensors.items()
        }
        if actual != expected:
            raise CheckpointError(
                f"stored tensors {actual} do not make a {self.fidelity.name} layer; expected "
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
        """Return a packed layer without an adapter.

        Args:
            fidelity: how it is stored; without an adapter.
            columns: the input column at each stored position, [in].
            parts: in stored order.
            row_scale: float32 representable in float16, [out]; for scales of fewer than 16 bits.
            outliers: for a fidelity with outliers.

        Raises:
            CheckpointError: the arguments do not make up such a layer.
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
        parts = []
        for name, columns, bits in named_parts(self.fidelity, self.in_features):
            codes = unpack(contiguous_transpose(self.tensors[f"{name}_codes"]), bits, columns)
            zero = unpack(self.tensors[f"{name}_zeros"], bits, self.out_features)
            scale = part_scales(self.tensors, name, bits, self.fidelity, self.out_features)
            parts.append(PartCodes(codes.float(), scale, zero.float()))
        return tuple(parts)

    @property
    def row_scale(self) -> Tensor | None:
        """The row scales, float32 [out]; None for scales of 16 bits."""
        return (
            self.tensors[ROW_SCALES].float() if self.fidelity.scale_bits < SCALE_BITS[0] else None
        )

    @property
    def outliers(self) -> Outliers | None:
        """The outliers; None for a fidelity without."""
        return stored_outliers(self.tensors) if self.fidelity.outlier_share else None

    @property
    def adapter(self) -> Adapter | None:
        """The low-rank adapter; None for a fidelity without."""
        return (
            Adapter(self.tensors[ADAPTER_A], self.tensors[ADAPTER_B])
            if self.fidelity.adapter_rank
            else None
        )

    def with_adapter(self, rank: int, adapter: Adapter) -> "QuantizedWeight":
        """Return the same layer with an adapter, for one that has none.

        Args:
            rank: the rank that the fidelity names; the layer's shape may limit the stored one.
            adapter: of the stored rank.
        """
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
