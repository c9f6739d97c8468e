"""Measured ends become a loss model of the whole menu: ends are kept exactly, what lies between is interpolated."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from allocator.menu import CONTEXT_RATIOS, Menu, make_menu
from allocator.profile import Array, Profile
from allocator.profiler import KEPT_TRACE, Effects, assemble, interpolation
from tests.test_allocator.synthetic import GROUP, PROPERTY, make_layers

TOKENS, WIDTH = 10, 8
LAYERS = make_layers(4)
ROWS = 2 * len(LAYERS)
DECAYS = (0.0, 0.5, 1.0, 3.0, 12.0)
"""Orders of magnitude by which each direction of the effects is below the one before it."""


def random_impact(columns: int, seed: int) -> Tensor:
    """Return column scores of which a few are much larger than the rest."""
    return torch.randn(columns, generator=torch.Generator().manual_seed(seed)).mul(2).exp()


def make_effects(decay: float) -> Effects:
    rng = np.random.default_rng(5)
    directions = np.linalg.qr(rng.normal(size=(TOKENS * WIDTH, ROWS)))[0]
    sizes = 10.0 ** (-decay * np.arange(ROWS))
    sketch = rng.normal(size=(ROWS, ROWS)) @ (sizes[:, None] * directions.T)
    return Effects(rng.normal(size=(ROWS, TOKENS)), torch.from_numpy(sketch).float(), 0.5)


def exact_gram(effects: Effects) -> Array:
    sketch = effects.sketch.double().numpy()
    return np.asarray(sketch @ sketch.T / TOKENS, dtype=np.float64)


def make_profile(menu: Menu, effects: Effects) -> Profile:
    impact = {layer.name: random_impact(layer.in_features, layer.in_features) for layer in LAYERS}
    linear, factor, truncation = assemble(LAYERS, menu, effects, impact)
    return Profile(LAYERS, menu.fidelities, menu.context, effects.context_loss, linear, factor, truncation, TOKENS, "a", "b")


def ends(values: Array) -> Array:
    """Return [..., 2 L] of [..., L * K]: the columns of the low and of the high end of each layer."""
    split = values.reshape(*values.shape[:-1], len(LAYERS), -1)
    return split[..., [0, -1]].reshape(*values.shape[:-1], ROWS)


@PROPERTY
@given(seed=st.integers(0, 10**6), columns=st.sampled_from([512, 576, 1536]), ratio=st.sampled_from(CONTEXT_RATIOS))
def test_effects_fall_to_the_context_and_rise_behind_it(seed: int, columns: int, ratio: float) -> None:
    menu, impact = make_menu(2, 4, GROUP, ratio), random_impact(columns, seed)
    shares = [interpolation(fidelity, menu, impact) for fidelity in menu.fidelities]
    assert shares[0] == (1.0, 0.0)
    assert shares[menu.context] == (0.0, 0.0)
    assert shares[-1] == (0.0, 1.0)
    assert all(before[0] > after[0] for before, after in pairwise(shares[: menu.context + 1]))
    assert all(before[1] < after[1] for before, after in pairwise(shares[menu.context :]))
    assert all(low == 0 or high == 0 for low, high in shares)


def test_a_share_is_that_of_the_impact_of_the_columns_that_change() -> None:
    menu = make_menu(2, 4, GROUP, 0.25)  # 128 of 512 columns
    impact = random_impact(512, 0)
    falling = sorted(impact.tolist(), reverse=True)
    down = interpolation(menu.fidelities[2], menu, impact)  # 64 columns
    up = interpolation(menu.fidelities[5], menu, impact)  # 192 columns
    assert down == (pytest.approx(sum(falling[64:128]) / sum(falling[:128])), 0.0)
    assert up == (0.0, pytest.approx(sum(falling[128:192]) / sum(falling[128:])))


def test_the_order_of_the_columns_does_not_matter() -> None:
    menu, impact = make_menu(2, 4, GROUP, 0.125), random_impact(512, 1)
    for fidelity in menu.fidelities:
        turned = interpolation(fidelity, menu, impact.flip(0))
        assert turned == pytest.approx(interpolation(fidelity, menu, impact))


def test_columns_without_impact_count_alike() -> None:
    menu = make_menu(2, 4, GROUP, 0.25)
    assert interpolation(menu.fidelities[2], menu, torch.zeros(512)) == (0.5, 0.0)
    assert interpolation(menu.fidelities[5], menu, torch.zeros(512)) == (0.0, pytest.approx(1 / 6))


def test_fidelities_that_store_a_narrow_layer_alike_have_no_effect() -> None:
    menu = make_menu(2, 4, 32, 0.25)
    shares = [interpolation(fidelity, menu, random_impact(64, 2)) for fidelity in menu.fidelities]
    assert shares == [(1.0, 0.0), *[(0.0, 0.0)] * 6, (0.0, 1.0)]


@pytest.mark.parametrize("decay", DECAYS)
def test_single_changes_to_the_ends_keep_their_measured_loss_at_any_rank(decay: float) -> None:
    effects = make_effects(decay)
    profile = make_profile(make_menu(2, 4, GROUP, 0.25), effects)
    measured = effects.first.mean(axis=1) + np.diag(exact_gram(effects)) / 2
    np.testing.assert_allclose(ends(profile.damage().ravel()), measured, rtol=1e-5)


def test_the_rank_follows_the_effects() -> None:
    ranks = [len(make_profile(make_menu(2, 4, GROUP, 0.25), make_effects(decay)).factor) for decay in DECAYS]
    assert ranks[0] > ROWS // 2
    assert ranks[-1] == 1
    assert ranks == sorted(ranks, reverse=True)


@pytest.mark.parametrize("decay", DECAYS)
def test_the_factor_keeps_the_coupling_of_the_ends(decay: float) -> None:
    effects = make_effects(decay)
    profile, gram = make_profile(make_menu(2, 4, GROUP, 0.25), effects), exact_gram(effects)
    kept = ends(profile.factor).T @ ends(profile.factor)
    assert np.linalg.eigvalsh(profile.factor.T @ profile.factor).min() > -1e-9 * np.trace(gram)
    assert np.linalg.norm(kept - gram) <= 1.01 * (1 - KEPT_TRACE) * np.trace(gram)
    assert profile.truncation == pytest.approx(1 - np.trace(kept) / np.trace(gram), abs=1e-6)
    assert -1e-12 < profile.truncation <= 1 - KEPT_TRACE


@pytest.mark.parametrize("decay", [0.0, 3.0])
def test_a_part_of_a_change_has_that_part_of_its_loss(decay: float) -> None:
    menu, effects = make_menu(2, 4, GROUP, 0.25), make_effects(decay)
    profile = make_profile(menu, effects)
    for row, layer in enumerate(LAYERS):
        impact = random_impact(layer.in_features, layer.in_features)
        for column, fidelity in enumerate(menu.fidelities):
            low, high = interpolation(fidelity, menu, impact)
            expected = low * profile.damage()[row, 0] + high * profile.damage()[row, -1]
            assert profile.damage()[row, column] == pytest.approx(expected, abs=1e-9)


def test_a_part_of_a_change_couples_with_other_layers_by_that_part() -> None:
    menu = make_menu(2, 4, GROUP, 0.25)
    profile = make_profile(menu, make_effects(0.5))
    gram = (profile.factor.T @ profile.factor).reshape(len(LAYERS), len(menu.fidelities), len(LAYERS), -1)
    low, _ = interpolation(menu.fidelities[1], menu, random_impact(LAYERS[0].in_features, LAYERS[0].in_features))
    assert 0 < low < 1
    np.testing.assert_allclose(gram[0, 1, 1:], low * gram[0, 0, 1:], atol=1e-12)


def test_the_context_has_no_effect() -> None:
    menu = make_menu(2, 4, GROUP, 0.125)
    profile = make_profile(menu, make_effects(0.5))
    assert not profile.linear[:, menu.context].any()
    assert not profile.factor.reshape(-1, *profile.linear.shape)[:, :, menu.context].any()


def test_changes_without_effect_are_no_division_by_zero() -> None:
    nothing = Effects(np.zeros((ROWS, TOKENS)), torch.zeros(ROWS, TOKENS * WIDTH), 0.5)
    profile = make_profile(make_menu(2, 4, GROUP, 0.25), nothing)
    assert not profile.linear.any()
    assert not profile.factor.any()
    assert profile.truncation == 0
