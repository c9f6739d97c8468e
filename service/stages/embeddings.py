"""The stage that measures the rest of the model, and chooses how to store embedding and head."""

from dataclasses import replace

from allocator.answers.embeddings import choose_embedding_options
from allocator.answers.whatif import WhatIf
from allocator.profile import Profile
from allocator.unquantized import Unquantized
from service.request.request import RunRequest
from service.stages.context import RunContext
from service.stages.embedding_losses import EmbeddingTask, measure_embedding_losses
from service.stages.embedding_options import embedding_options
from service.stages.prepared_run import PreparedRun
from service.stages.unquantized import unquantized_of
from service.stages.windows import Windows


def measure_unquantized(
    context: RunContext, prepared: PreparedRun, windows: Windows, probes: Windows
) -> Unquantized:
    """Return what the checkpoint contains beside its layers.

    Where embedding and head are quantized too, this includes the measured ways to store them.

    Args:
        context: gives model and machine.
        prepared: gives the layers, and the embedding and head that are quantized.
        windows: embedding and head are quantized on them.
        probes: the loss of each way to store them is measured on them.
    """
    unquantized = unquantized_of(prepared.sizes, prepared.layers, prepared.tables)
    if not prepared.tables:
        return unquantized
    losses = measure_embedding_losses(context, EmbeddingTask(prepared.tables, windows, probes))
    options = tuple(
        embedding_options(table, losses[table.name], prepared.sizes.item_bytes)
        for table in prepared.tables
    )
    return replace(unquantized, embedding_options=options)


def choose_embeddings(
    request: RunRequest, prepared: PreparedRun, profile: Profile, unquantized: Unquantized
) -> PreparedRun:
    """Choose the fidelities of embedding and head, where they are quantized.

    Returns:
        The prepared run with these fidelities, and with the budget that they leave to the layers.
    """
    if not prepared.tables:
        return prepared
    whatif = WhatIf(profile, request.constraints)
    chosen = choose_embedding_options(whatif, unquantized.embedding_options, prepared.shared_bytes)
    return replace(
        prepared,
        budget_bytes=prepared.shared_bytes - sum(choice.weight_bytes for choice in chosen),
        embedding_fidelities={
            choice.embedding: choice.fidelity for choice in chosen if choice.fidelity is not None
        },
    )
