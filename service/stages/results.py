"""Everything that the report of a run is made from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from allocator.answers.allocation import Allocation
from allocator.profile import Profile
from allocator.profiling.prediction_check import PredictionCheck
from quantizer.plans.plan import Plan
from quantizer.running.quality import Quality
from service.stages.delivery import Delivery
from service.stages.plan import CandidatePlans
from service.stages.prepared_run import PreparedRun
from service.stages.training_task import TrainingTask


@dataclass(frozen=True, slots=True)
class RunResults:
    """The results of all stages of a run.

    Attributes:
        prepared: sizes, and the fidelities of embedding and head.
        profile: what the plans were chosen by.
        plans: the candidate plans.
        delivery: the checkpoint that is delivered.
        training: how its layers were trained; no phases if they were not.
        quality: of `original`, `plan` and `uniform` on held-out text, and of `untuned`, the plan
            before training, if the trained one is delivered.
        checks: random plans, predicted and measured; empty if none were asked for.
    """

    prepared: PreparedRun
    profile: Profile
    plans: CandidatePlans
    delivery: Delivery
    training: TrainingTask
    quality: Mapping[str, Quality]
    checks: Sequence[PredictionCheck]

    @property
    def allocation(self) -> Allocation:
        """The delivered plan, with the solver's findings."""
        return self.plans.allocation(self.delivery.selection.delivered, self.profile)

    @property
    def whole_plan(self) -> Plan:
        """The delivered plan with embedding and head."""
        return self.plans.by_name[self.delivery.selection.delivered]

    @property
    def uniform(self) -> Plan:
        """The best uniform plan."""
        return self.plans.uniforms[self.delivery.selection.uniform]
