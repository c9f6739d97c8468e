"""Contexts of runs, for tests that call stages one by one."""

from pathlib import Path

from quantizer.models.source import find_model
from service.request.request import BATCH
from service.stages.context import RunContext
from service.stages.machine import Machine
from service.stages.progress import Silent
from service.storage.stage_store import StageStore


def run_context(model: Path, root: Path) -> RunContext:
    """Return the context of a run on the processor, with finished stages below `root`."""
    folder = find_model(str(model), root / "models")
    return RunContext(StageStore(root), folder, Machine.choose("cpu"), Silent(), BATCH)
