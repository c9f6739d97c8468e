"""First-order terms are shrunk by the share of them that is noise."""

import numpy as np
import pytest
import torch

from allocator.profiling.end_effects import EndEffects, shrink_noise

LAYERS = 200
TOKENS = 64
WIDTH = 8


def effects(signal: float, noise: float) -> tuple[EndEffects, np.ndarray]:
    """Return effects and the true means of their first-order terms.

    The first-order terms are -2 * squared effect + signal, with noise added to each token.
    """
    rng = np.random.default_rng(3)
    scale = rng.uniform(0.5, 1.5, 2 * LAYERS)
    sketch = torch.tensor(
        rng.normal(size=(2 * LAYERS, TOKENS * WIDTH)) * scale[:, None], dtype=torch.float32
    )
    own = sketch.square().sum(1).double().numpy() / TOKENS
    truth = -2 * own + signal * rng.normal(size=2 * LAYERS)
    first = truth[:, None] + noise * rng.normal(size=(2 * LAYERS, TOKENS))
    return EndEffects(first, sketch, 1.0), truth


def test_pure_noise_is_removed() -> None:
    noisy, truth = effects(signal=0.0, noise=20.0)
    shrunk = shrink_noise(noisy).first.mean(axis=1)
    assert (
        np.square(shrunk - truth).mean() < 0.1 * np.square(noisy.first.mean(axis=1) - truth).mean()
    )


def test_what_both_halves_agree_on_is_kept() -> None:
    clean, truth = effects(signal=5.0, noise=0.01)
    assert np.abs(shrink_noise(clean).first.mean(axis=1) - truth).max() < 0.05


def test_error_falls_when_signal_and_noise_are_mixed() -> None:
    mixed, truth = effects(signal=2.0, noise=16.0)
    before, after = mixed.first.mean(axis=1), shrink_noise(mixed).first.mean(axis=1)
    assert np.square(after - truth).mean() < 0.75 * np.square(before - truth).mean()


def test_few_layers_are_not_changed() -> None:
    noisy, _ = effects(signal=0.0, noise=20.0)
    few = EndEffects(noisy.first[:8], noisy.sketch[:8], 1.0)
    assert (shrink_noise(few).first == few.first).all()


def test_one_sample_has_no_halves_and_is_not_changed() -> None:
    noisy, _ = effects(signal=0.0, noise=20.0)
    single = EndEffects(noisy.first[:, :1], noisy.sketch[:, :WIDTH], 1.0)
    assert (shrink_noise(single).first == single.first).all()


@pytest.mark.parametrize("end", [0, 1])
def test_an_end_without_effect_is_not_changed(end: int) -> None:
    noisy, _ = effects(signal=0.0, noise=20.0)
    sketch = noisy.sketch.clone()
    sketch[end::2] = 0
    shrunk = shrink_noise(EndEffects(noisy.first, sketch, 1.0)).first
    assert (shrunk[end::2] == noisy.first[end::2]).all()
    assert (shrunk[1 - end :: 2] == shrink_noise(noisy).first[1 - end :: 2]).all()


def test_only_first_order_terms_change() -> None:
    noisy, _ = effects(signal=0.0, noise=20.0)
    shrunk = shrink_noise(noisy)
    assert (shrunk.first != noisy.first).any()
    assert torch.equal(shrunk.sketch, noisy.sketch)
    assert shrunk.context_loss == noisy.context_loss
