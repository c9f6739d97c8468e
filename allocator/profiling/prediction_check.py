"""Check how well a profile predicts the loss, on random plans that it was not measured on.

Each plan is assembled from quantized candidates, and its KL divergence is measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from allocator.profile import Profile
from allocator.profiling.candidates import Candidates
from allocator.profiling.random_plans import random_plans
from allocator.solver.program import Choice
from quantizer.durable import PartStore, Progress
from quantizer.modules.linear import set_dequantized_weight
from quantizer.running.divergence import divergence
from quantizer.running.memoized import memoized
from quantizer.running.runner import BlockRunner


@dataclass(frozen=True, slots=True)
class PredictionCheckSpec:
    """Which plans are checked, and on which text.

    Attributes:
        budget_bytes: plans have about this many bytes, see `random_plans`.
        count: number of plans.
        windows: token windows that the profile was not measured on, int64 [windows, tokens].
    """

    budget_bytes: int
    count: int
    windows: Tensor


@dataclass(frozen=True, slots=True)
class PredictionCheck:
    """Prediction and measurement of one random plan.

    Attributes:
        bits_per_weight: size of the plan.
        predicted_kl: KL divergence that the profile predicts, [nats/token].
        measured_kl: measured KL divergence, [nats/token].
    """

    bits_per_weight: float
    predicted_kl: float
    measured_kl: float


def check_predictions(
    runner: BlockRunner,
    profile: Profile,
    candidates: Candidates,
    spec: PredictionCheckSpec,
    parts: PartStore,
    on_progress: Progress,
) -> list[PredictionCheck]:
    """Return predictions and measurements of random plans around a budget.

    The model is left with the last plan. The plans depend on the model and the budget only, so they
    are the same in each run.

    Args:
        runner: the model, not quantized.
        profile: the profile that is checked.
        candidates: the profile's layers; the weights of all fidelities must be stored.
        spec: which plans, and on which text.
        parts: where finished measurements are stored.
        on_progress: called after each plan.
    """
    batches = torch.split(spec.windows, 1)
    originals = [runner.final_states(batch) for batch in batches]

    def measure(choice: Choice) -> dict[str, Tensor]:
        _assemble(runner, profile, choice, candidates)
        losses = [
            divergence(runner, batch, runner.final_states(batch), original)[0]
            for batch, original in zip(batches, originals, strict=True)
        ]
        return {"kl": torch.cat(losses).double().mean().reshape(1)}

    seed = int(profile.model_sha256[:8], 16)
    checks: list[PredictionCheck] = []
    for index, choice in enumerate(random_plans(profile, spec.budget_bytes, spec.count, seed)):
        measured = memoized(parts, f"check-{index:04d}", partial(measure, choice))
        bits = profile.plan(choice).bits_per_weight
        checks.append(PredictionCheck(bits, profile.loss(choice), float(measured["kl"])))
        on_progress(index + 1, spec.count)
    return checks


def summary(checks: Sequence[PredictionCheck]) -> dict[str, Any]:
    """Return Spearman's rank correlation, the slope of measured on predicted KL, and all checks.

    All are JSON values.
    """
    predicted = pd.Series([check.predicted_kl for check in checks])
    measured = pd.Series([check.measured_kl for check in checks])
    return {
        "spearman": float(predicted.rank().corr(measured.rank())),
        "slope": float(np.polyfit(predicted, measured, 1)[0]),
        "plans": [
            {
                "bits_per_weight": check.bits_per_weight,
                "predicted_kl_nats_per_token": check.predicted_kl,
                "measured_kl_nats_per_token": check.measured_kl,
            }
            for check in checks
        ],
    }


def _assemble(
    runner: BlockRunner, profile: Profile, choice: Choice, candidates: Candidates
) -> None:
    """Give every layer of the model its fidelity of a plan, from the stored candidates."""
    chosen = {
        layer.name: profile.fidelities[int(at)]
        for layer, at in zip(profile.layers, choice, strict=True)
    }
    for block in candidates.blocks({name: (fidelity,) for name, fidelity in chosen.items()}):
        for name, weights in block.weights.items():
            set_dequantized_weight(runner.model, name, weights[chosen[name].name])
