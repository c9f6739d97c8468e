"""The report of a run: the result as a stable JSON document."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from service.errors import RequestError
from service.report import json_values
from service.report.layers import PlanInfo, TableInfo
from service.report.methods import (
    CalibrationInfo,
    ModelInfo,
    ProfileInfo,
    Provenance,
    TrainingInfo,
)
from service.report.quality import Evaluation, Prediction, RandomPlanChecks, SelectionInfo

SCHEMA = "bitwright.report/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The result of a run.

    Within a version of the schema, fields are added, but never renamed or removed. Fields with a
    default are missing in older reports.

    Attributes:
        schema: name and version of this format.
        model: the original model.
        budget: as the user wrote it.
        constraints: further demands on the plan, see
            `allocator.demands.constraints.Constraints.to_json`.
        budget_bytes: the budget of the quantized layers.
        plan_bytes: size of the quantized layers.
        slack_bytes: bytes of the budget that are not used.
        bits_per_weight: average size of a weight of the quantized layers.
        checkpoint_bytes: size of all weight files of the checkpoint.
        original_bytes: size of all weight files of the original.
        original_layer_bytes: size of the layers in the original.
        tables: embedding and head by name, if they are quantized.
        unquantized_bytes: size of everything in the checkpoint that is not quantized.
        uniform_bytes: size of the layers under the best uniform plan.
        evaluation: scores on held-out text.
        calibration: the calibration text.
        tuning: how the delivered layers were trained.
        guard: the comparison of candidate plans.
        profile: how the effects of layers were measured.
        prediction: predicted and measured loss.
        checks: predictions for random plans; null if none were asked for.
        plan: the delivered plan.
        uniform: fidelity of each layer under the best uniform plan, by name of the layer.
        damage_nats_per_token: change of the loss when a layer alone takes a fidelity [nats/token],
            by name of the layer and of the fidelity.
        side_files: SHA-256 of each file of the original that is delivered as it is, such as those
            of the tokenizer, by name; missing in older reports.
        notes: what the user should know, in sentences.
        seconds: wall time by stage.
        provenance: versions and circumstances.
    """

    schema: str
    model: ModelInfo
    budget: str
    constraints: Mapping[str, Any] = field(default_factory=dict)
    budget_bytes: int
    plan_bytes: int
    slack_bytes: int
    bits_per_weight: float
    checkpoint_bytes: int
    original_bytes: int
    original_layer_bytes: int
    tables: Mapping[str, TableInfo] = field(default_factory=dict)
    unquantized_bytes: int
    uniform_bytes: int
    evaluation: Evaluation
    calibration: CalibrationInfo
    tuning: TrainingInfo | None = None
    guard: SelectionInfo | None = None
    profile: ProfileInfo | None = None
    prediction: Prediction
    checks: RandomPlanChecks | None = None
    plan: PlanInfo
    uniform: Mapping[str, str]
    damage_nats_per_token: Mapping[str, Mapping[str, float]]
    side_files: Mapping[str, str] | None = field(default=None, metadata=json_values.OMIT_IF_NONE)
    notes: tuple[str, ...]
    seconds: Mapping[str, float]
    provenance: Provenance

    @property
    def delivered(self) -> str:
        """Name of the candidate plan that is delivered."""
        return "plan" if self.guard is None else self.guard.delivered

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        document: dict[str, Any] = json_values.to_json(self)
        return document

    @classmethod
    def from_json(cls, document: Any) -> "Report":
        """Return the report that `to_json` wrote, of this version of the package or an older one.

        Raises:
            RequestError: the schema is another one, or a field is missing or of the wrong type.
        """
        schema = document.get("schema") if isinstance(document, dict) else None
        if schema != SCHEMA:
            raise RequestError(f"report schema {schema!r}; this version reads {SCHEMA!r}")
        return json_values.from_json(cls, document, "the report")
