"""A linear layer's weight in stored form: packed codes, scales, zero points, column order."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantizer.errors import CheckpointError
from quantizer.fidelity import Fidelity, words
from quantizer.grid import dequantize
from quantizer.packing import pack, unpack

PART_NAMES = ("high", "low")
COLUMNS = "columns"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype that a stored tensor must have."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class PartCodes:
    """Result of quantizing one part, before packing.

    Attributes:
        codes: integers as floats, [out, columns of the part], in stored order.
        scale: float32 representable in 16 bits, [groups, out].
        zero: integers as floats, [groups, out].
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """The stored tensors of one layer.

    Names and shapes for a part with c columns of width b, g = ceil(c / group_size), n = out_features:
    `<part>_codes` int32 [n, words(c, b)], `<part>_scales` float16 [g, n], `<part>_zeros` int32 [g, words(n, b)], part being
    `high` or `low`; and `columns` [in], the input column at each stored position, uint16 or int32.
    """

    fidelity: Fidelity
    out_features: int
    in_features: int
    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        """Refuse tensors that do not make up such a layer."""
        expected = tensor_specs(self.fidelity, self.out_features, self.in_features)
        found = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in self.tensors.items()}
        if found != expected:
            raise CheckpointError(f"stored tensors {found} do not make a {self.fidelity.name} layer; expected {expected}")

    @classmethod
    def from_codes(cls, fidelity: Fidelity, columns: Tensor, parts: tuple[PartCodes, ...]) -> "QuantizedWeight":
        """Pack the parts, given in stored order with `columns` [in] as the column order."""
        in_features, out_features = columns.numel(), parts[0].codes.shape[0]
        tensors = {COLUMNS: columns.to(_column_dtype(in_features))}
        for (name, _, bits), part in zip(named_parts(fidelity, in_features), parts, strict=True):
            tensors[f"{name}_codes"] = pack(part.codes.to(torch.uint8), bits)
            tensors[f"{name}_scales"] = part.scale.half()
            tensors[f"{name}_zeros"] = pack(part.zero.to(torch.uint8), bits)
        return cls(fidelity, out_features, in_features, tensors)

    def parts(self) -> tuple[PartCodes, ...]:
        """Return the parts that `from_codes` packed, in stored order."""
        found = []
        for name, columns, bits in named_parts(self.fidelity, self.in_features):
            codes = unpack(self.tensors[f"{name}_codes"], bits, columns)
            zero = unpack(self.tensors[f"{name}_zeros"], bits, self.out_features)
            found.append(PartCodes(codes.float(), self.tensors[f"{name}_scales"].float(), zero.float()))
        return tuple(found)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the stored tensors; equal to `Fidelity.weight_bytes`."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight [out, in], computed in float32 and rounded once to `dtype`."""
        return dequantize_tensors(self.tensors, self.fidelity, self.out_features, self.in_features, dtype)


def named_parts(fidelity: Fidelity, in_features: int) -> Iterator[tuple[str, int, int]]:
    """Yield (name, columns, bits) of each stored part in stored order."""
    high = fidelity.high_columns(in_features)
    names = PART_NAMES if high else PART_NAMES[1:]
    for name, (columns, bits) in zip(names, fidelity.parts(in_features), strict=True):
        yield name, columns, bits


def tensor_specs(fidelity: Fidelity, out_features: int, in_features: int) -> dict[str, TensorSpec]:
    """Return shape and dtype of every tensor that stores such a layer, without making any."""
    specs = {COLUMNS: TensorSpec((in_features,), _column_dtype(in_features))}
    for name, columns, bits in named_parts(fidelity, in_features):
        groups = -(-columns // fidelity.group_size)
        specs[f"{name}_codes"] = TensorSpec((out_features, words(columns, bits)), torch.int32)
        specs[f"{name}_scales"] = TensorSpec((groups, out_features), torch.float16)
        specs[f"{name}_zeros"] = TensorSpec((groups, words(out_features, bits)), torch.int32)
    return specs


def dequantize_tensors(
    tensors: Mapping[str, Tensor], fidelity: Fidelity, out_features: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """Return the weight [out, in] that the stored tensors stand for; see `QuantizedWeight`."""
    parts = []
    for name, columns, bits in named_parts(fidelity, in_features):
        codes = unpack(tensors[f"{name}_codes"], bits, columns)
        scale = tensors[f"{name}_scales"].float()
        zero = unpack(tensors[f"{name}_zeros"], bits, out_features)
        group = torch.arange(columns, device=codes.device) // fidelity.group_size
        parts.append(dequantize(codes.t().float(), scale[group], zero.float()[group]))  # [columns, out]
    stored = torch.cat(parts) if len(parts) > 1 else parts[0]
    weight = torch.empty_like(stored)
    weight[tensors[COLUMNS].to(torch.int64)] = stored
    return weight.t().to(dtype)


def _column_dtype(in_features: int) -> torch.dtype:
    return torch.uint16 if in_features <= 2**16 else torch.int32
