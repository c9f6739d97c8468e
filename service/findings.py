"""Draw up the report of a finished run."""

import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np

from allocator.allocate import Allocation
from allocator.profile import Array, Profile
from quantizer.checkpoint import checkpoint_bytes
from quantizer.evaluate import Quality
from quantizer.plan import Plan
from quantizer.source import ModelFolder
from service.report import SCHEMA, Report
from service.request import RunRequest
from service.sizes import ModelSizes

_PACKAGES = ("bitwright", "torch", "transformers", "cvxpy", "osqp", "numpy")


@dataclass(frozen=True, slots=True)
class Comparison:
    """A plan beside the uniform plan of the same bytes.

    Attributes:
        profile: what the plan was chosen by.
        allocation: the plan.
        uniform: the uniform plan.
        quality: of `original`, `plan` and `uniform` on held-out text.
    """

    profile: Profile
    allocation: Allocation
    uniform: Plan
    quality: dict[str, Quality]


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
        "budget_bytes": allocation.budget_bytes,
        "plan_bytes": plan.weight_bytes,
        "slack_bytes": allocation.slack_bytes,
        "bits_per_weight": plan.bits_per_weight,
        "checkpoint_bytes": checkpoint_bytes(checkpoint),
        "original_bytes": sizes.file_bytes,
        "original_layer_bytes": sizes.layer_bytes,
        "unquantized_bytes": checkpoint_bytes(checkpoint) - plan.weight_bytes,
        "uniform_bytes": comparison.uniform.weight_bytes,
        "evaluation": {
            **{name: comparison.quality[name].to_json() for name in ("original", "uniform", "plan")},
            "text": request.effort.evaluation.source,
        },
        "calibration": {"text": request.effort.calibration.source, "sha256": comparison.profile.calibration_sha256},
        "prediction": _prediction(comparison),
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


def shares_of(profile: Profile, plan: Plan) -> Array:
    """Return a plan as shares of the menu's fidelities, [L, K]; a fidelity between two of the menu is a mix of them by bytes."""
    sizes = profile.weight_bytes
    share = np.zeros(profile.linear.shape)
    for row, size in enumerate(plan.layer_bytes):
        order = np.argsort(sizes[row], kind="stable")
        above = int(np.searchsorted(sizes[row][order], size).clip(1, len(order) - 1))
        low, high = int(order[above - 1]), int(order[above])
        span = int(sizes[row, high] - sizes[row, low])
        part = float(np.clip((size - int(sizes[row, low])) / span, 0, 1)) if span else 1.0
        share[row, low] += 1 - part
        share[row, high] += part
    return share


def _prediction(comparison: Comparison) -> dict[str, dict[str, float]]:
    """Return modelled loss on calibration text beside measured loss on held-out text, for both plans."""
    profile, quality = comparison.profile, comparison.quality
    predicted = {
        "plan": comparison.allocation.predicted_loss,
        "uniform": profile.loss_of_shares(shares_of(profile, comparison.uniform)),
    }
    return {
        name: {
            "predicted_kl_nats_per_token": loss,
            "measured_kl_nats_per_token": quality[name].kl_nats_per_token,
            "measured_kl_stderr": quality[name].kl_stderr,
        }
        for name, loss in predicted.items()
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
    plan, uniform = comparison.quality["plan"], comparison.quality["uniform"]
    change = 1 - plan.kl_nats_per_token / uniform.kl_nats_per_token if uniform.kl_nats_per_token > 0 else 0.0
    if change < 0:
        notes.append(f"the plan is worse than the uniform plan of the same bytes: KL {-change:.1%} higher on the evaluation text")
    return notes
