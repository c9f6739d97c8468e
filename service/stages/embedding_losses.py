"""The stage that measures the loss of each way to store embedding and head."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from quantizer.conversion import blocks
from quantizer.conversion.embedding_losses import embedding_losses
from quantizer.conversion.embeddings import EMBEDDING_FIDELITIES, quantize_embeddings
from quantizer.durable import PartStore
from quantizer.plans.plan import LayerSpec
from service.stages.context import RunContext
from service.stages.windows import Windows
from service.storage.stage_store import StageKey

PROBES = 8
"""Probe windows that embedding and head are measured on; each option is run on all of them."""


@dataclass(frozen=True, slots=True)
class EmbeddingTask:
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


def measure_embedding_losses(
    context: RunContext, task: EmbeddingTask
) -> dict[str, dict[str, float]]:
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
