"""Draw up the report of a finished run."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from allocator.answers.allocation import Allocation
from allocator.demands.menu import uniform_bytes
from allocator.profile import Profile, shares_of
from allocator.profiling.prediction_check import PredictionCheck, summary
from quantizer.conversion.checkpoint import checkpoint_bytes
from quantizer.models.folder import ModelFolder
from quantizer.plans.fidelity import Fidelity
from quantizer.plans.plan import LayerSpec, Plan
from quantizer.running.quality import Quality
from service.report.document import SCHEMA, Report
from service.request.request import RunRequest
from service.stages.guard import Guard
from service.stages.sizes import ModelSizes
from service.stages.tuning import TuneTask

_PACKAGES = ("bitwright", "torch", "transformers", "cvxpy", "osqp", "numpy")


@dataclass(frozen=True, slots=True)
class Comparison:
    """A plan beside the uniform plan of the same bytes.

    Attributes:
        profile: what the plan was chosen by.
        allocation: the plan that is delivered.
        uniform: the uniform plan.
        tables: how embedding and head are stored, with either plan; those that stay as they are,
            are missing.
        guard: why this plan was delivered.
        tuning: how its layers were trained; no phases if they were not.
        quality: of `original`, `plan` and `uniform` on held-out text, and of `untuned`, the plan
            before training, where the trained one is delivered.
        checks: random plans, predicted and measured; empty if none were asked for.
    """

    profile: Profile
    allocation: Allocation
    uniform: Plan
    tables: Mapping[LayerSpec, Fidelity]
    guard: Guard
    tuning: TuneTask
    quality: dict[str, Quality]
    checks: list[PredictionCheck]


def build_report(
    request: RunRequest,
    model: ModelFolder,
    sizes: ModelSizes,
    comparison: Comparison,
    checkpoint: Path,
    seconds: dict[str, float],
) -> Report:
    """Return the report of a finished run."""
    allocation, plan = comparison.allocation, comparison.allocation.plan
    return {
        "schema": SCHEMA,
        "model": {"name": model.name, "sha256": model.sha256, "dtype": model.dtype},
        "budget": request.budget.text,
        "constraints": request.constraints.to_json(),
        "budget_bytes": allocation.budget_bytes,
        "plan_bytes": plan.weight_bytes,
        "slack_bytes": allocation.slack_bytes,
        "bits_per_weight": plan.bits_per_weight,
        "checkpoint_bytes": checkpoint_bytes(checkpoint),
        "original_bytes": sizes.file_bytes,
        "original_layer_bytes": sizes.layer_bytes,
        "tables": {
            table.name: _table(table, fidelity) for table, fidelity in comparison.tables.items()
        },
        "unquantized_bytes": checkpoint_bytes(checkpoint)
        - plan.with_embeddings(comparison.tables).weight_bytes,
        "uniform_bytes": comparison.uniform.weight_bytes,
        "evaluation": {
            **{name: quality.to_json() for name, quality in comparison.quality.items()},
            "text": request.amounts.evaluation.source,
        },
        "calibration": {
            "text": request.amounts.calibration.source,
            "sha256": comparison.profile.calibration_sha256,
        },
        "tuning": _tuning(request, comparison.tuning),
        "guard": {"text": request.amounts.calibration.source} | comparison.guard.to_json(),
        "profile": _profile(comparison.profile, request),
        "prediction": _prediction(comparison),
        "checks": summary(comparison.checks) if comparison.checks else None,
        "plan": allocation.to_json(),
        "uniform": {name: fidelity.name for name, fidelity in comparison.uniform.by_name.items()},
        "damage_nats_per_token": _damage(comparison.profile),
        "notes": _notes(comparison),
        "seconds": {stage: round(spent, 2) for stage, spent in seconds.items()},
        "provenance": {
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "seed": request.seed,
            **{package: version(package) for package in _PACKAGES},
        },
    }


def _table(table: LayerSpec, fidelity: Fidelity) -> dict[str, Any]:
    return {
        "kind": table.kind,
        "fidelity": fidelity.name,
        "weight_bytes": uniform_bytes((table,), fidelity),
    }


def _prediction(comparison: Comparison) -> dict[str, dict[str, float]]:
    """Return modelled loss on calibration text beside measured loss on held-out text, for both plans, untrained."""
    profile, quality = comparison.profile, comparison.quality
    measured = {"plan": quality.get("untuned", quality["plan"]), "uniform": quality["uniform"]}
    predicted = {
        "plan": comparison.allocation.predicted_loss,
        "uniform": profile.loss_of_shares(shares_of(profile, comparison.uniform)),
    }
    return {
        name: {
            "predicted_kl_nats_per_token": loss,
            "measured_kl_nats_per_token": measured[name].kl_nats_per_token,
            "measured_kl_stderr": measured[name].kl_stderr,
        }
        for name, loss in predicted.items()
    }


def _tuning(request: RunRequest, tuning: TuneTask) -> dict[str, Any]:
    """Return how the delivered layers were trained."""
    return {
        "effort": request.effort.name,
        "phases": [phase.to_json() for phase in tuning.phases],
        "windows": len(tuning.windows.tokens) if tuning.phases else 0,
    }


def _profile(profile: Profile, request: RunRequest) -> dict[str, Any]:
    """Return how effects were measured."""
    return {
        "signal": profile.signal,
        "coupling": request.method.coupling if len(profile.factor) else "none",
        "coupling_rank": len(profile.factor),
        "coupling_truncation": profile.truncation,
        "context": "original"
        if profile.context is None
        else profile.fidelities[profile.context].name,
        "context_kl_nats_per_token": profile.context_loss,
        "budget_range_bytes": list(profile.budget_range),
        "probe_tokens": profile.tokens,
        "fidelities": [fidelity.name for fidelity in profile.fidelities],
    }


def _damage(profile: Profile) -> dict[str, dict[str, float]]:
    """Return by layer and fidelity how the loss changes when this layer alone leaves the context."""
    damage = profile.damage()
    names = [fidelity.name for fidelity in profile.fidelities]
    return {
        layer.name: {name: float(value) for name, value in zip(names, row, strict=True)}
        for layer, row in zip(profile.layers, damage, strict=True)
    }


def _notes(comparison: Comparison) -> list[str]:
    notes = list(comparison.allocation.notes)
    guard = comparison.guard
    for table, fidelity in comparison.tables.items():
        notes.append(
            f"{table.kind} ({table.name}) is stored at {fidelity.name}, with the plan and the "
            "uniform plan alike"
        )
    if guard.delivered != "plan":
        kl = {
            name: f"{guard.quality[name].kl_nats_per_token:.4f}"
            for name in ("plan", guard.delivered)
        }
        notes.append(
            f"the guard delivers {guard.delivered!r}: KL {kl[guard.delivered]} on text that no "
            "plan was fitted to, "
            f"against {kl['plan']} of the solver's plan"
        )
    nearest = guard.quality[guard.uniform].kl_nats_per_token
    if nearest < guard.quality[guard.delivered].kl_nats_per_token:
        notes.append(
            f"{guard.uniform!r} is nearer to the original (KL {nearest:.4f} in the guard) but "
            "breaks the constraints"
        )
    if guard.tuned is not None and not guard.keeps_tuned:
        reached = f"KL {guard.tuned.kl_nats_per_token:.4f} on text that it was not trained on"
        notes.append(f"training did not help ({reached}): the plan is delivered as it was before")
    plan, uniform = comparison.quality["plan"], comparison.quality["uniform"]
    change = (
        1 - plan.kl_nats_per_token / uniform.kl_nats_per_token
        if uniform.kl_nats_per_token > 0
        else 0.0
    )
    if change < 0:
        notes.append(
            f"the plan is worse than the uniform plan of the same bytes: KL {-change:.1%} higher "
            "on the evaluation text"
        )
    return notes
