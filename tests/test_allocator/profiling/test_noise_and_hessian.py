"""The two signals from the literature: `noise` in one layer, and layers' own output errors."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from allocator.profile import Array
from allocator.profiling.context import ProfilingContext
from allocator.profiling.hessian import measure_hessian
from allocator.profiling.loss_model import LossModel
from allocator.profiling.noise import layer_alphas, measure_noise
from allocator.signals import NOISE_LEVELS
from quantizer.durable import PartStore
from tests.support.profiled_models import (
    MENU,
    Loader,
    divergences,
    log_probs,
    make_context,
    make_loader,
    make_spec,
    run,
    windows,
)

PROBES = windows(8, 64, 1)
DRAWS = 4


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Loader:
    return make_loader(tmp_path_factory.mktemp("signals"))


@pytest.fixture(scope="module")
def candidates(tmp_path_factory: pytest.TempPathFactory) -> PartStore:
    return PartStore(tmp_path_factory.mktemp("candidates"))


def context_of(signal: str, load: Loader, candidates: PartStore, folder: Path) -> ProfilingContext:
    return make_context(load(), candidates, PartStore(folder), make_spec(signal, PROBES, batch=4))


@pytest.fixture(scope="module")
def context(
    load: Loader, candidates: PartStore, tmp_path_factory: pytest.TempPathFactory
) -> ProfilingContext:
    return context_of("noise", load, candidates, tmp_path_factory.mktemp("noise"))


@pytest.fixture(scope="module")
def alphas(context: ProfilingContext) -> Array:
    return layer_alphas(context)


@pytest.fixture(scope="module")
def layerwise(
    load: Loader, candidates: PartStore, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ProfilingContext, LossModel]:
    context = context_of("hessian", load, candidates, tmp_path_factory.mktemp("hessian"))
    return context, measure_hessian(context)


def divergence_of_noise(load: Loader, level: float) -> Array:
    """Return the exact KL of the original with noise in one layer, [L], mean of a few draws."""
    model = load()
    generator = torch.Generator().manual_seed(1)
    original = log_probs(model, PROBES)
    found: list[Any] = []
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        weight = module.weight.data
        losses: list[float] = []
        for _ in range(DRAWS):
            draw = torch.randn(weight.shape, generator=generator)
            module.weight.data = weight + draw * (level * weight.norm() / draw.norm())
            with torch.no_grad():
                losses.append(float(divergences(original, model, PROBES).mean()))
        module.weight.data = weight
        found.append(np.mean(losses))
    return np.array(found)


def test_alpha_is_the_divergence_of_a_layer_s_noise_over_its_squared_size(
    load: Loader, alphas: Array
) -> None:
    exact = divergence_of_noise(load, NOISE_LEVELS[0]) / NOISE_LEVELS[0] ** 2
    assert exact.max() > 10 * exact.min()
    assert np.linalg.norm(alphas - exact) < 0.2 * np.linalg.norm(exact)
    assert np.abs(alphas / exact - 1).max() < 0.4


def test_damage_by_noise_is_alpha_times_the_weight_error_around_the_original(
    context: ProfilingContext, alphas: Array
) -> None:
    model = measure_noise(context)
    exact = np.zeros(model.linear.shape)
    for at, layer in enumerate(context.layers):
        for k, fidelity in enumerate(MENU.fidelities):
            if fidelity in context.candidates.kept_fidelities:
                before = context.originals[layer.name]
                weights = context.candidates.block(layer.block).weights[layer.name]
                error = weights[fidelity.name].dequantize() - before
                exact[at, k] = alphas[at] * float(error.square().sum() / before.square().sum())
    stored = context.candidates.kept_fidelities
    kept = [k for k, fidelity in enumerate(MENU.fidelities) if fidelity in stored]
    assert len(kept) == 3
    assert np.allclose(model.linear[:, kept], exact[:, kept], rtol=1e-3)
    assert (model.linear > 0).all()
    assert model.context_loss == 0
    assert model.factor.shape == (0, model.linear.size)


def test_a_profile_by_noise_has_the_original_for_its_context(
    load: Loader, candidates: PartStore, tmp_path: Path
) -> None:
    profile = run(load(), PartStore(tmp_path), make_spec("noise", PROBES), MENU, candidates)
    assert profile.context is None
    assert profile.context_loss == 0
    least = profile.loss([len(MENU.fidelities) - 1] * 21)
    assert 0 < least < profile.loss([MENU.context] * 21) < profile.loss([0] * 21)


def test_the_seed_decides_the_noise(
    load: Loader, candidates: PartStore, tmp_path: Path, alphas: Array
) -> None:
    def alphas_at(seed: int, folder: str) -> Array:
        return layer_alphas(
            make_context(
                load(),
                candidates,
                PartStore(tmp_path / folder),
                make_spec("noise", PROBES, batch=4, seed=seed),
            )
        )

    assert np.array_equal(alphas_at(0, "same"), alphas)
    other = alphas_at(1000, "other")
    assert 0 < np.linalg.norm(other - alphas) < 0.3 * np.linalg.norm(alphas)


def test_output_errors_of_the_context_add_up_to_its_divergence(
    layerwise: tuple[ProfilingContext, LossModel], load: Loader
) -> None:
    context, found = layerwise
    original = log_probs(load(), PROBES)
    with torch.no_grad():
        exact = float(divergences(original, context.runner.model, PROBES).mean())
    assert found.context_loss == pytest.approx(exact, rel=1e-4)
    unit = found.linear[:, 0] / (context.output_error[:, 0] - context.output_error[:, MENU.context])
    assert unit == pytest.approx(unit[0], rel=1e-6)  # one for all layers
    assert float((unit * context.output_error[:, MENU.context]).sum()) == pytest.approx(
        exact, rel=1e-4
    )


def test_damage_is_proportional_to_the_output_error_above_the_context_s(
    layerwise: tuple[ProfilingContext, LossModel],
) -> None:
    context, found = layerwise
    unit = found.context_loss / sum(context.output_error[at, MENU.context] for at in range(21))
    for at in range(21):
        for k in range(len(MENU.fidelities)):
            exact = unit * (context.output_error[at, k] - context.output_error[at, MENU.context])
            assert found.linear[at, k] == pytest.approx(exact, rel=1e-9, abs=1e-15)
    assert found.factor.shape == (0, found.linear.size)
