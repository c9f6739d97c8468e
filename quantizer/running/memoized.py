"""Tensors that are computed once and stored, so that interrupted work continues from them."""

from collections.abc import Callable, Mapping

from safetensors.torch import load, save
from torch import Tensor

from quantizer.durable import PartStore


def memoized(
    parts: PartStore, name: str, compute: Callable[[], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Return the tensors stored as a part, on the CPU. Compute and store them first if missing.

    Args:
        parts: where results are stored.
        name: the part.
        compute: returns the tensors by name; called only if the part is missing or damaged.
    """
    data = parts.read(name)
    if data is None:
        data = save({key: tensor.contiguous().cpu() for key, tensor in compute().items()})
        parts.write(name, data)
    tensors: dict[str, Tensor] = load(data)
    return tensors
