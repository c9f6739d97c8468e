"""Sizes of embedding and head at the fidelities that they can be stored at."""

from collections.abc import Sequence

from allocator.demands.menu import uniform_bytes
from quantizer.conversion.embeddings import EMBEDDING_FIDELITIES
from quantizer.plans.plan import LayerSpec


def likely_bytes(tables: Sequence[LayerSpec]) -> tuple[int, int]:
    """Return the bytes that embedding and head may take, before their fidelities are chosen.

    Returns:
        Bytes at the middle one of the options, and at the smallest.
    """
    middle = EMBEDDING_FIDELITIES[len(EMBEDDING_FIDELITIES) // 2]
    return uniform_bytes(tables, middle), uniform_bytes(tables, EMBEDDING_FIDELITIES[-1])
