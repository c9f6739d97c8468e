"""The stage that measures the rest of the model, and chooses how to store embedding and head."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from allocator.answers.embeddings import choose_embedding_options
from allocator.answers.whatif import WhatIf
from allocator.demands.menu import uniform_bytes
from allocator.profile import Profile
from allocator.unquantized import EmbeddingOption, Unquantized
from quantizer.conversion import blocks
from quantizer.conversion.embedding_losses import embedding_losses
from quantizer.conversion.embeddings import EMBEDDING_FIDELITIES, quantize_embeddings
from quantizer.durable import PartStore
from quantizer.plans.plan import LayerSpec
from service.request.request import RunRequest
from service.stages.context import RunContext
from service.stages.model_sizes import unquantized_of
from service.stages.prepared_run import PreparedRun
from service.stages.windows import Windows
from service.storage.stage_store import StageKey

PROBES = 8
"""Probe windows that embedding and head are measured on; each option is run on all of them."""


@dataclass(frozen=True, slots=True)
class TableTask:
    """Everything that decides what the ways to store embedding and head cost, beside the context.

    Attributes:
        tables: embedding and head.
        calibration: windows that they are quantized on.
        probes: windows that they are measured on.
    """

    tables: tuple[LayerSpec, ...]
    calibration: Windows
    probes: Windows

    def key(self, context: RunContext) -> StageKey:
        """Return what the losses are stored under."""
        inputs = {
            "model": context.model.sha256,
            "calibration": self.calibration.sha256,
            "probes": self.probes.sha256,
            "used": PROBES,
            "batch": context.batch,
            "options": [option.name for option in EMBEDDING_FIDELITIES],
            "method": blocks.METHOD,
            "machine": context.machine.inputs(),
        }
        return StageKey("tables", inputs)


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
    losses = measure_tables(context, TableTask(prepared.tables, windows, probes))
    options = tuple(
        _options(table, losses[table.name], prepared.sizes.item_bytes) for table in prepared.tables
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


def _options(
    table: LayerSpec, losses: dict[str, float], item_bytes: int
) -> tuple[EmbeddingOption, ...]:
    """Return the ways to store a table: unquantized, and at each of `EMBEDDING_FIDELITIES`."""
    unquantized = EmbeddingOption(table, None, table.weights * item_bytes, 0.0)
    quantized = [
        EmbeddingOption(table, option, uniform_bytes((table,), option), losses[option.name])
        for option in EMBEDDING_FIDELITIES
    ]
    return (unquantized, *quantized)


def measure_tables(context: RunContext, task: TableTask) -> dict[str, dict[str, float]]:
    """Return the loss of each option, [nats/token], by name of the table and of the fidelity."""

    def make(folder: Path, _: PartStore) -> None:
        machine = context.machine
        report_progress = context.reporter.step("embedding and head")
        runner = context.load()
        batches = torch.split(context.on_device(task.calibration), context.batch)
        probes = task.probes.tokens[:PROBES].to(machine.device)
        losses: dict[str, dict[str, float]] = {}
        for at, table in enumerate(task.tables):
            candidates = [
                quantize_embeddings(runner, {table.name: option}, batches)[table.name]
                for option in EMBEDDING_FIDELITIES
            ]
            changed = [{table.name: each.dequantize(machine.dtype)} for each in candidates]
            measured = embedding_losses(runner.model, changed, probes, machine.precision)
            losses[table.name] = {
                option.name: loss
                for option, loss in zip(EMBEDDING_FIDELITIES, measured, strict=True)
            }
            report_progress(at + 1, len(task.tables))
        (folder / "tables.json").write_text(json.dumps(losses), encoding="utf-8")

    folder = context.store.get(task.key(context), make)
    losses: dict[str, dict[str, float]] = json.loads(
        (folder / "tables.json").read_text(encoding="utf-8")
    )
    return losses
