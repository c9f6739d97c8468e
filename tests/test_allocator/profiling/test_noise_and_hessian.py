"""The two signals of the literature.

What noise in one layer costs, and what layers' own output errors are.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from allocator.profile import Array
from allocator.profiling.hessian import hessian
from allocator.profiling.noise import layer_alphas, noise
from allocator.profiling.signal import LossModel, Scene
from allocator.signals import NOISE_LEVELS
from quantizer.durable import PartStore
from tests.support.profiled_models import (
    MENU,
    Loader,
    divergences,
    log_probs,
    make_loader,
    make_scene,
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
def forms(tmp_path_factory: pytest.TempPathFactory) -> PartStore:
    return PartStore(tmp_path_factory.mktemp("forms"))


def scene_of(signal: str, load: Loader, forms: PartStore, folder: Path) -> Scene:
    return make_scene(load(), forms, PartStore(folder), make_spec(signal, PROBES, batch=4))


@pytest.fixture(scope="module")
def scene(load: Loader, forms: PartStore, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return scene_of("noise", load, forms, tmp_path_factory.mktemp("noise"))


@pytest.fixture(scope="module")
def alphas(scene: Scene) -> Array:
    return layer_alphas(scene)


@pytest.fixture(scope="module")
def layerwise(
    load: Loader, forms: PartStore, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Scene, LossModel]:
    scene = scene_of("hessian", load, forms, tmp_path_factory.mktemp("hessian"))
    return scene, hessian(scene)


def divergence_of_noise(load: Loader, level: float) -> Array:
    """Return the exact KL that noise of a relative size in one layer of the original gives, [L].

    The mean of a few draws.
    """
    model, generator = load(), torch.Generator().manual_seed(1)
    original, found = log_probs(model, PROBES), []
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        weight, losses = module.weight.data, []
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
    scene: Scene, alphas: Array
) -> None:
    model = noise(scene)
    exact = np.zeros(model.linear.shape)
    for at, layer in enumerate(scene.layers):
        for k, fidelity in enumerate(MENU.fidelities):
            if fidelity in scene.forms:
                before = scene.originals[layer.name]
                form = scene.block(layer.block).weights[layer.name][fidelity.name].dequantize()
                exact[at, k] = alphas[at] * float(
                    (form - before).square().sum() / before.square().sum()
                )
    kept = [k for k, fidelity in enumerate(MENU.fidelities) if fidelity in scene.forms]
    assert len(kept) == 3
    assert np.allclose(model.linear[:, kept], exact[:, kept], rtol=1e-3)
    assert (model.linear > 0).all()
    assert model.context_loss == 0
    assert model.factor.shape == (0, model.linear.size)


def test_a_profile_by_noise_has_the_original_for_its_context(
    load: Loader, forms: PartStore, tmp_path: Path
) -> None:
    profile = run(load(), PartStore(tmp_path), make_spec("noise", PROBES), MENU, forms)
    assert profile.context is None
    assert profile.context_loss == 0
    least = profile.loss([len(MENU.fidelities) - 1] * 21)
    assert 0 < least < profile.loss([MENU.context] * 21) < profile.loss([0] * 21)


def test_the_seed_decides_the_noise(
    load: Loader, forms: PartStore, tmp_path: Path, alphas: Array
) -> None:
    def alphas_at(seed: int, folder: str) -> Array:
        return layer_alphas(
            make_scene(
                load(),
                forms,
                PartStore(tmp_path / folder),
                make_spec("noise", PROBES, batch=4, seed=seed),
            )
        )

    assert np.array_equal(alphas_at(0, "same"), alphas)
    other = alphas_at(1000, "other")
    assert 0 < np.linalg.norm(other - alphas) < 0.3 * np.linalg.norm(alphas)


def test_output_errors_of_the_context_add_up_to_its_divergence(
    layerwise: tuple[Scene, LossModel], load: Loader
) -> None:
    scene, found = layerwise
    original = log_probs(load(), PROBES)
    with torch.no_grad():
        exact = float(divergences(original, scene.runner.model, PROBES).mean())
    assert found.context_loss == pytest.approx(exact, rel=1e-4)
    unit = found.linear[:, 0] / (scene.output_error[:, 0] - scene.output_error[:, MENU.context])
    assert unit == pytest.approx(unit[0], rel=1e-6)  # one for all layers
    assert float((unit * scene.output_error[:, MENU.context]).sum()) == pytest.approx(
        exact, rel=1e-4
    )


def test_damage_by_output_errors_is_what_they_exceed_the_context_s_by(
    layerwise: tuple[Scene, LossModel],
) -> None:
    scene, found = layerwise
    unit = found.context_loss / sum(scene.output_error[at, MENU.context] for at in range(21))
    for at in range(21):
        for k in range(len(MENU.fidelities)):
            exact = unit * (scene.output_error[at, k] - scene.output_error[at, MENU.context])
            assert found.linear[at, k] == pytest.approx(exact, rel=1e-9, abs=1e-15)
    assert found.factor.shape == (0, found.linear.size)
