"""The stage that compares a profile's predictions with measurements.

It draws random plans that the profile was not measured on, and measures their loss on held-out
windows.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from allocator.profile import Profile
from allocator.profiling.candidates import Candidates
from allocator.profiling.prediction_check import (
    PredictionCheck,
    PredictionCheckSpec,
    check_predictions,
)
from quantizer.durable import PartStore
from service.request.request import RunRequest
from service.stages.context import RunContext
from service.stages.layer_candidates import quantize_layers
from service.stages.profile import ProfileTask
from service.stages.windows import Windows
from service.storage.stage_store import StageKey


@dataclass(frozen=True, slots=True)
class CheckTask:
    """Everything that decides the check of a profile, beside the context.

    Attributes:
        profile: how the profile was measured; all quantized candidates must have been kept.
        budget_bytes: size of the layers around which plans are drawn.
        plans: how many plans are drawn; 0 for no check.
        windows: held-out windows that their loss is measured on.
    """

    profile: ProfileTask
    budget_bytes: int
    plans: int
    windows: Windows

    @classmethod
    def for_run(
        cls, request: RunRequest, profile: ProfileTask, budget_bytes: int, windows: Windows
    ) -> "CheckTask":
        """Return the check that a run asks for."""
        return cls(profile, budget_bytes, request.amounts.check_plans, windows)

    def key(self, context: RunContext) -> StageKey:
        """Return what the check is stored under."""
        inputs = {
            "profile": self.profile.key(context).digest,
            "budget_bytes": self.budget_bytes,
            "count": self.plans,
            "windows": self.windows.sha256,
        }
        return StageKey("checks", inputs)


def check_random_plans(
    context: RunContext, task: CheckTask, profile: Profile
) -> list[PredictionCheck]:
    """Return random plans with predicted and measured loss; none where none were asked for."""
    if not task.plans:
        return []

    def make(folder: Path, parts: PartStore) -> None:
        stored = quantize_layers(context, task.profile.candidates)
        checked = check_predictions(
            context.load(),
            profile,
            Candidates(profile.layers, task.profile.candidates.menu, stored),
            PredictionCheckSpec(task.budget_bytes, task.plans, context.on_device(task.windows)),
            parts,
            context.reporter.step("check"),
        )
        rows = [asdict(check) for check in checked]
        (folder / "checks.json").write_text(json.dumps(rows), encoding="utf-8")

    folder = context.store.get(task.key(context), make)
    stored = json.loads((folder / "checks.json").read_text(encoding="utf-8"))
    return [PredictionCheck(**row) for row in stored]
