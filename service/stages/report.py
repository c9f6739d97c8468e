"""The stage that builds the report of a finished run."""

import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version

from allocator.demands.menu import uniform_bytes
from allocator.profile import Profile
from quantizer.conversion.checkpoint import checkpoint_bytes
from quantizer.models.side_files import side_file_digests
from service.report.document import SCHEMA, Report
from service.report.json_values import from_json
from service.report.layers import PlanInfo, TableInfo
from service.report.methods import (
    CalibrationInfo,
    ModelInfo,
    PhaseInfo,
    ProfileInfo,
    Provenance,
    TrainingInfo,
)
from service.request.request import RunRequest
from service.stages.context import RunContext
from service.stages.report_notes import notes_of
from service.stages.report_quality import checks_of, evaluation_of, prediction_of, selection_of
from service.stages.results import RunResults

_PACKAGES = ("bitwright", "torch", "transformers", "cvxpy", "osqp", "numpy")


def build_report(
    context: RunContext, request: RunRequest, results: RunResults, seconds: Mapping[str, float]
) -> Report:
    """Return the report of a finished run.

    Args:
        context: gives the model.
        request: what was asked for.
        results: of all stages.
        seconds: wall time by stage.
    """
    model, sizes = context.model, results.prepared.sizes
    allocation = results.allocation
    plan = allocation.plan
    delivered_bytes = checkpoint_bytes(results.delivery.checkpoint)
    return Report(
        schema=SCHEMA,
        model=ModelInfo(model.name, model.sha256, model.dtype),
        budget=request.budget.text,
        constraints=request.constraints.to_json(),
        budget_bytes=allocation.budget_bytes,
        plan_bytes=plan.weight_bytes,
        slack_bytes=allocation.slack_bytes,
        bits_per_weight=plan.bits_per_weight,
        checkpoint_bytes=delivered_bytes,
        original_bytes=sizes.file_bytes,
        original_layer_bytes=sizes.layer_bytes,
        tables=_tables(results),
        unquantized_bytes=delivered_bytes - results.whole_plan.weight_bytes,
        uniform_bytes=results.uniform.weight_bytes,
        evaluation=evaluation_of(request, results.quality),
        calibration=CalibrationInfo(
            request.amounts.calibration.source, results.profile.calibration_sha256
        ),
        tuning=_training(request, results),
        guard=selection_of(request, results),
        profile=_profile(request, results.profile),
        prediction=prediction_of(results),
        checks=checks_of(results),
        plan=from_json(PlanInfo, allocation.to_json(), "the plan"),
        uniform={name: fidelity.name for name, fidelity in results.uniform.by_name.items()},
        damage_nats_per_token=_damage(results.profile),
        side_files=side_file_digests(model.path),
        notes=tuple(notes_of(results)),
        seconds={stage: round(spent, 2) for stage, spent in seconds.items()},
        provenance=_provenance(request.seed),
    )


def _tables(results: RunResults) -> dict[str, TableInfo]:
    return {
        table.name: TableInfo(table.kind, fidelity.name, uniform_bytes((table,), fidelity))
        for table, fidelity in results.prepared.embedding_fidelities.items()
    }


def _training(request: RunRequest, results: RunResults) -> TrainingInfo:
    training = results.training
    phases = tuple(from_json(PhaseInfo, phase.to_json(), "a phase") for phase in training.phases)
    windows = len(training.windows.tokens) if phases else 0
    return TrainingInfo(request.effort.name, phases, windows)


def _profile(request: RunRequest, profile: Profile) -> ProfileInfo:
    context = "original" if profile.context is None else profile.fidelities[profile.context].name
    low, high = profile.budget_range
    return ProfileInfo(
        signal=profile.signal,
        coupling=request.method.coupling if len(profile.factor) else "none",
        coupling_rank=len(profile.factor),
        coupling_truncation=profile.truncation,
        context=context,
        context_kl_nats_per_token=profile.context_loss,
        budget_range_bytes=(low, high),
        probe_tokens=profile.tokens,
        fidelities=tuple(fidelity.name for fidelity in profile.fidelities),
    )


def _damage(profile: Profile) -> dict[str, dict[str, float]]:
    names = [fidelity.name for fidelity in profile.fidelities]
    return {
        layer.name: dict(zip(names, map(float, row), strict=True))
        for layer, row in zip(profile.layers, profile.damage(), strict=True)
    }


def _provenance(seed: int) -> Provenance:
    return Provenance(
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=platform.machine(),
        python=platform.python_version(),
        seed=seed,
        **{package: version(package) for package in _PACKAGES},
    )
