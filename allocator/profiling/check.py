"""Check a profile's predictions.

Random plans that it never saw, assembled from stored forms and measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load, save
from torch import Tensor

from allocator.profile import Profile
from allocator.profiling.random_plans import random_plans
from quantizer.conversion.blocks import read_blocks
from quantizer.durable import PartStore, Progress
from quantizer.modules.linear import set_dequantized_weight
from quantizer.running.divergence import divergence
from quantizer.running.runner import BlockRunner


@dataclass(frozen=True, slots=True)
class Check:
    """One random plan.

    Attributes:
        bits_per_weight: its size.
        predicted_kl: by the profile, [nats/token].
        measured_kl: on text that the profile was not measured on, [nats/token].
    """

    bits_per_weight: float
    predicted_kl: float
    measured_kl: float


def check_plans(
    runner: BlockRunner,
    profile: Profile,
    budget_bytes: int,
    count: int,
    windows: Tensor,
    forms: PartStore,
    parts: PartStore,
    on_progress: Progress,
) -> list[Check]:
    """Return the checks of `count` random plans around a budget.

    The model is left in the last of them.

    Args:
        runner: the model, unquantized.
        profile: what is checked.
        budget_bytes: around which plans are drawn.
        count: how many.
        windows: int64 [windows, tokens].
        forms: stored forms of every layer at every fidelity of the menu.
        parts: where finished checks are kept.
        on_progress: told of finished checks.
    """
    batches = torch.split(windows, 1)
    originals = [runner.final_states(batch) for batch in batches]
    checks = []
    for index, choice in enumerate(random_plans(profile, budget_bytes, count, _seed(profile))):
        plan = profile.plan(choice)
        data = parts.read(f"check-{index:04d}")
        if data is None:
            _assemble(runner, profile, choice, forms)
            losses = [
                divergence(runner, batch, runner.final_states(batch), original)[0]
                for batch, original in zip(batches, originals, strict=True)
            ]
            data = save({"kl": torch.cat(losses).double().mean().reshape(1).cpu()})
            parts.write(f"check-{index:04d}", data)
        checks.append(Check(plan.bits_per_weight, profile.loss(choice), float(load(data)["kl"])))
        on_progress(index + 1, count)
    return checks


def _seed(profile: Profile) -> int:
    """Return a seed that a profile always gives, so that its checks are the same at each run."""
    return int(profile.model_sha256[:8], 16)


def summary(checks: Sequence[Check]) -> dict[str, Any]:
    """Return rank correlation (Spearman) and slope of measured on predicted KL, and all checks, as JSON values."""
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
    runner: BlockRunner, profile: Profile, choice: Sequence[int] | np.ndarray, forms: PartStore
) -> None:
    chosen = {
        layer.name: profile.fidelities[int(at)]
        for layer, at in zip(profile.layers, choice, strict=True)
    }
    choices = {name: (fidelity,) for name, fidelity in chosen.items()}
    for block in read_blocks(forms, profile.layers, choices):
        for name, weights in block.weights.items():
            set_dequantized_weight(runner.model, name, weights[chosen[name].name])
