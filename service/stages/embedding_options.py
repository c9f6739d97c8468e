"""The ways to store embedding and head, and their sizes."""

from collections.abc import Sequence

from allocator.demands.menu import uniform_bytes
from allocator.unquantized import EmbeddingOption
from quantizer.conversion.embeddings import EMBEDDING_FIDELITIES
from quantizer.plans.plan import LayerSpec


def likely_bytes(tables: Sequence[LayerSpec]) -> tuple[int, int]:
    """Return the bytes that embedding and head may take, before their fidelities are chosen.

    Returns:
        Bytes at the middle one of the options, and at the smallest.
    """
    middle = EMBEDDING_FIDELITIES[len(EMBEDDING_FIDELITIES) // 2]
    return uniform_bytes(tables, middle), uniform_bytes(tables, EMBEDDING_FIDELITIES[-1])


def embedding_options(
    table: LayerSpec, losses: dict[str, float], item_bytes: int
) -> tuple[EmbeddingOption, ...]:
    """Return the ways to store a table: unquantized, and at each of `EMBEDDING_FIDELITIES`."""
    unquantized = EmbeddingOption(table, None, table.weights * item_bytes, 0.0)
    quantized = [
        EmbeddingOption(table, option, uniform_bytes((table,), option), losses[option.name])
        for option in EMBEDDING_FIDELITIES
    ]
    return (unquantized, *quantized)
