"""The stage that quantizes every layer at every fidelity of the menu.

The results, the quantized candidates of a layer, are what profiles are measured with. All signals
share them.
"""

from dataclasses import dataclass
from pathlib import Path

from allocator.demands.menu import Menu
from allocator.profiling.candidates import Candidates, quantize_candidates
from quantizer.conversion import blocks
from quantizer.durable import PartStore
from quantizer.structure.blocks import find_layers
from service.stages.context import RunContext
from service.stages.windows import Windows
from service.storage.disk import link_or_copy
from service.storage.stage_store import StageKey


@dataclass(frozen=True, slots=True)
class CandidatesTask:
    """Everything that decides the quantized candidates of a model's layers, beside the context.

    Attributes:
        menu: the fidelities, and the one that all other layers have while one is quantized.
        calibration: windows that layers are quantized on.
        keep_all: whether candidates that no signal needs are stored too, so that any plan can be
            assembled from them.
    """

    menu: Menu
    calibration: Windows
    keep_all: bool

    def key(self, context: RunContext) -> StageKey:
        """Return what the candidates are stored under."""
        inputs = {
            "model": context.model.sha256,
            "calibration": self.calibration.sha256,
            "menu": [fidelity.name for fidelity in self.menu.fidelities],
            "context": self.menu.context,
            "keep_all": self.keep_all,
            "batch": context.batch,
            "method": blocks.METHOD,
            "machine": context.machine.inputs(),
        }
        return StageKey("candidates", inputs)


def quantize_layers(context: RunContext, task: CandidatesTask) -> PartStore:
    """Quantize every layer at every fidelity of the menu, or continue where this stopped."""

    def make(folder: Path, parts: PartStore) -> None:
        runner = context.load()
        quantize_candidates(
            runner,
            Candidates(find_layers(runner.model), task.menu, parts),
            context.calibration(task.calibration),
            context.reporter.step("profile: quantize"),
            keep_all=task.keep_all,
        )
        for part in parts.paths():
            link_or_copy(part, folder / part.name)

    return PartStore(context.store.get(task.key(context), make))
