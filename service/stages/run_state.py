"""The results of a run so far."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from allocator.profile import Profile
from service.report.document import Report
from service.stages.delivery import Delivery
from service.stages.plan import CandidatePlans


@dataclass(frozen=True, slots=True)
class RunState:
    """The results of a run after one of its stages; it grows from stage to stage.

    Attributes:
        stage: the stage that ended, one of `service.request.stage_names.PIPELINE`.
        profile: what was measured, or given.
        plans: the candidate plans; None before the stage `plan`.
        checkpoints: folders of the quantized candidates, by name of their plan.
        delivery: the checkpoint that is delivered; None before the stage `tune`.
        report: the report; None before the stage `evaluate`.
    """

    stage: str
    profile: Profile
    plans: CandidatePlans | None = None
    checkpoints: Mapping[str, Path] = field(default_factory=dict)
    delivery: Delivery | None = None
    report: Report | None = None
