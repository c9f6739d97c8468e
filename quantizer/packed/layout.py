"""Names, shapes and dtypes of the tensors that store a layer."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from quantizer.plans.fidelity import SCALE_BITS, Fidelity, word_count

PART_NAMES = ("high", "low")

COLUMNS = "columns"
ROW_SCALES = "row_scales"
OUTLIER_VALUES = "outlier_values"
OUTLIER_COLUMNS = "outlier_columns"
OUTLIER_STARTS = "outlier_starts"
ADAPTER_A = "adapter_a"
ADAPTER_B = "adapter_b"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def named_parts(fidelity: Fidelity, in_features: int) -> Iterator[tuple[str, int, int]]:
    """Yield (name, columns, bits) of each stored part, the high-impact part first."""
    high = fidelity.high_columns(in_features)
    names = PART_NAMES if high else PART_NAMES[1:]
    for name, (columns, bits) in zip(names, fidelity.parts(in_features), strict=True):
        yield name, columns, bits


def tensor_specs(fidelity: Fidelity, out_features: int, in_features: int) -> dict[str, TensorSpec]:
    """Return the shape and dtype of every tensor that stores a layer, by name, in stored order.

    `quantizer.packed.weight.QuantizedWeight` says what they mean.
    """
    specs = {COLUMNS: TensorSpec((in_features,), column_dtype(in_features))}
    for name, columns, bits in named_parts(fidelity, in_features):
        groups = -(-columns // fidelity.group_size)
        specs[f"{name}_codes"] = TensorSpec((word_count(columns, bits), out_features), torch.int32)
        if fidelity.scale_bits == SCALE_BITS[0]:
            specs[f"{name}_scales"] = TensorSpec((groups, out_features), torch.float16)
        else:
            specs[f"{name}_scale_codes"] = TensorSpec(
                (groups, word_count(out_features, fidelity.scale_bits)), torch.int32
            )
        specs[f"{name}_zeros"] = TensorSpec((groups, word_count(out_features, bits)), torch.int32)
    if fidelity.scale_bits < SCALE_BITS[0]:
        specs[ROW_SCALES] = TensorSpec((out_features,), torch.float16)
    if count := fidelity.outlier_count(out_features, in_features):
        specs[OUTLIER_VALUES] = TensorSpec((count,), torch.float16)
        specs[OUTLIER_COLUMNS] = TensorSpec((count,), column_dtype(in_features))
        specs[OUTLIER_STARTS] = TensorSpec((out_features + 1,), torch.int32)
    if rank := fidelity.stored_adapter_rank(out_features, in_features):
        specs[ADAPTER_A] = TensorSpec((rank, in_features), torch.float16)
        specs[ADAPTER_B] = TensorSpec((out_features, rank), torch.float16)
    return specs


def column_dtype(in_features: int) -> torch.dtype:
    """Return the dtype of stored column numbers: uint16 up to 65,536 columns, else int32."""
    return torch.uint16 if in_features <= 2**16 else torch.int32
