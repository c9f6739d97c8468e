"""The stage in which the ways to store embedding and head are measured."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from allocator.answers.embeddings import TableChoice
from allocator.demands.menu import uniform_bytes
from quantizer.conversion import blocks
from quantizer.conversion.embeddings import (
    EMBEDDING_FIDELITIES,
    embedding_losses,
    quantize_embeddings,
)
from quantizer.durable import PartStore
from quantizer.models.folder import ModelFolder
from quantizer.models.loading import load_model
from quantizer.plans.plan import LayerSpec
from service.stages.machine import Machine
from service.stages.progress import Reporter
from service.stages.windows import Windows
from service.storage.stage_store import StageKey, StageStore

PROBES = 8
"""Windows that tables are measured on: each way is run on all of them."""


@dataclass(frozen=True, slots=True)
class TableTask:
    """All that decides what tables cost.

    Attributes:
        model: the original.
        tables: its embedding and head.
        item_bytes: bytes of a weight that is not quantized.
        calibration: windows that they are quantized on.
        probes: windows that they are measured on.
        batch: windows that are run at once.
        machine: where.
    """

    model: ModelFolder
    tables: tuple[LayerSpec, ...]
    item_bytes: int
    calibration: Windows
    probes: Windows
    batch: int
    machine: Machine

    @property
    def key(self) -> StageKey:
        """What the losses are kept under."""
        inputs = {
            "model": self.model.sha256,
            "calibration": self.calibration.sha256,
            "probes": self.probes.sha256,
            "used": PROBES,
            "batch": self.batch,
            "options": [option.name for option in EMBEDDING_FIDELITIES],
            "method": blocks.METHOD,
            "machine": self.machine.inputs(),
        }
        return StageKey("tables", inputs)


def ways_of(store: StageStore, task: TableTask, reporter: Reporter) -> list[list[TableChoice]]:
    """Return for each table the ways to store it.

    As it is, and at each of `quantizer.conversion.embeddings.EMBEDDING_FIDELITIES`.
    """
    losses = _losses(store, task, reporter)
    return [
        [TableChoice(table, None, table.weights * task.item_bytes, 0.0)]
        + [
            TableChoice(table, each, uniform_bytes((table,), each), losses[table.name][each.name])
            for each in EMBEDDING_FIDELITIES
        ]
        for table in task.tables
    ]


def likely_bytes(tables: Sequence[LayerSpec]) -> tuple[int, int]:
    """Return what tables may take before it is known how they are stored.

    At the middle one of the ways, and at the smallest.
    """
    return uniform_bytes(
        tables, EMBEDDING_FIDELITIES[len(EMBEDDING_FIDELITIES) // 2]
    ), uniform_bytes(tables, EMBEDDING_FIDELITIES[-1])


def _losses(store: StageStore, task: TableTask, reporter: Reporter) -> dict[str, dict[str, float]]:
    """Measure what each way costs; by name of the table and of the fidelity."""
    machine = task.machine

    def make(folder: Path, _: PartStore) -> None:
        loaded, told = (
            load_model(task.model, machine.dtype, machine.device),
            reporter.step("embedding and head"),
        )
        runner, batches = (
            machine.runner(loaded),
            torch.split(task.calibration.tokens.to(machine.device), task.batch),
        )
        probes, found = task.probes.tokens[:PROBES].to(machine.device), {}
        for at, table in enumerate(task.tables):
            forms = [
                quantize_embeddings(runner, {table.name: option}, batches)[table.name]
                for option in EMBEDDING_FIDELITIES
            ]
            changed = [{table.name: form.dequantize(machine.dtype)} for form in forms]
            losses = embedding_losses(loaded, changed, probes, machine.precision)
            found[table.name] = {
                option.name: loss for option, loss in zip(EMBEDDING_FIDELITIES, losses, strict=True)
            }
            told(at + 1, len(task.tables))
        (folder / "tables.json").write_text(json.dumps(found), encoding="utf-8")

    losses: dict[str, dict[str, float]] = json.loads(
        (store.get(task.key, make) / "tables.json").read_text(encoding="utf-8")
    )
    return losses
