"""Prediction checks: random plans are assembled from candidates, measured, and stored."""

from pathlib import Path
from typing import Any

import pytest
import torch

from allocator.profile import Profile
from allocator.profiling.candidates import Candidates, quantize_candidates
from allocator.profiling.prediction_check import (
    PredictionCheck,
    PredictionCheckSpec,
    check_predictions,
    summary,
)
from allocator.profiling.random_plans import random_plans
from quantizer.durable import PartStore, Progress
from quantizer.running.runner import BlockRunner
from quantizer.structure.blocks import find_layers
from tests.support.profiled_models import (
    CALIBRATION,
    MENU,
    Loader,
    divergences,
    log_probs,
    make_loader,
    make_spec,
    no_progress,
    run,
    windows,
)

COUNT = 5
WINDOWS = windows(3, 32, 9)


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Loader:
    return make_loader(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def candidates(load: Loader, tmp_path_factory: pytest.TempPathFactory) -> Candidates:
    """Return candidates with the weights of all fidelities."""
    model = load()
    store = PartStore(tmp_path_factory.mktemp("candidates"))
    found = Candidates(find_layers(model), MENU, store)
    quantize_candidates(BlockRunner(model), found, CALIBRATION, no_progress, keep_all=True)
    return found


@pytest.fixture(scope="module")
def profile(
    load: Loader, candidates: Candidates, tmp_path_factory: pytest.TempPathFactory
) -> Profile:
    parts = PartStore(tmp_path_factory.mktemp("profile"))
    return run(load(), parts, make_spec("hessian"), MENU, candidates.store)


def check(
    model: Any,
    profile: Profile,
    candidates: Candidates,
    folder: Path,
    on_progress: Progress = no_progress,
) -> list[PredictionCheck]:
    spec = PredictionCheckSpec(budget_of(profile), COUNT, WINDOWS)
    runner = BlockRunner(model)
    return check_predictions(runner, profile, candidates, spec, PartStore(folder), on_progress)


def budget_of(profile: Profile) -> int:
    return int(profile.weight_bytes[:, MENU.context].sum())


def test_checks_state_size_prediction_and_exact_divergence_of_each_plan(
    load: Loader, profile: Profile, candidates: Candidates, tmp_path: Path
) -> None:
    model = load()
    original = log_probs(load(), WINDOWS)
    checks = check(model, profile, candidates, tmp_path)
    seed = int(profile.model_sha256[:8], 16)
    plans = random_plans(profile, budget_of(profile), COUNT, seed)
    assert [found.predicted_kl for found in checks] == [profile.loss(choice) for choice in plans]
    assert [found.bits_per_weight for found in checks] == [
        profile.plan(choice).bits_per_weight for choice in plans
    ]
    with torch.no_grad():  # the model is left with the last plan
        exact = float(divergences(original, model, WINDOWS).mean())
    assert checks[-1].measured_kl == pytest.approx(exact, rel=1e-4)


def test_measured_plans_are_not_measured_again(
    load: Loader, profile: Profile, candidates: Candidates, tmp_path: Path
) -> None:
    steps: list[tuple[int, int]] = []
    checks = check(load(), profile, candidates, tmp_path, lambda *at: steps.append(at))
    assert steps == [(at + 1, COUNT) for at in range(COUNT)]
    passes: list[int] = []
    model = load()
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    assert check(model, profile, candidates, tmp_path) == checks
    assert len(passes) == 2 * len(WINDOWS)  # the original's states only


def test_the_summary_has_rank_correlation_and_slope() -> None:
    checks = [PredictionCheck(2.0, kl, 1 + 2 * kl) for kl in (0.1, 0.3, 0.2)]
    found = summary(checks)
    assert found["spearman"] == pytest.approx(1)
    assert found["slope"] == pytest.approx(2)
    assert found["plans"][1] == {
        "bits_per_weight": 2.0,
        "predicted_kl_nats_per_token": 0.3,
        "measured_kl_nats_per_token": 1.6,
    }
