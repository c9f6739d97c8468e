"""The loss model of a menu keeps measured ends exactly and interpolates fidelities between."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from allocator.profile import Array, Profile
from allocator.profiling.coupling import between_layers
from allocator.profiling.end_effects import EndEffects, interpolation, menu_effects
from tests.support.synthetic_profiles import PROPERTY, make_fidelities, make_layers

TOKENS, WIDTH = 10, 8
LAYERS = make_layers(4)
ROWS = 2 * len(LAYERS)
MENU, CONTEXT = 7, 3
DECAYS = (0.0, 0.5, 1.0, 3.0, 12.0)
"""Orders of magnitude by which each direction of the effects is below the one before it."""


def falling_errors(seed: int, layers: int = len(LAYERS)) -> Array:
    """Return squared errors that fall along the menu, [layers, MENU]."""
    rng = np.random.default_rng(seed)
    steps = rng.uniform(0.1, 1, (layers, MENU)) * rng.uniform(0.01, 100, (layers, 1))
    return np.asarray(np.flip(np.flip(steps, 1).cumsum(1), 1), dtype=np.float64)


SHARES = interpolation(falling_errors(0), CONTEXT)


def make_effects(decay: float) -> EndEffects:
    rng = np.random.default_rng(5)
    directions = np.linalg.qr(rng.normal(size=(TOKENS * WIDTH, ROWS)))[0]
    sizes = 10.0 ** (-decay * np.arange(ROWS))
    sketch = rng.normal(size=(ROWS, ROWS)) @ (sizes[:, None] * directions.T)
    return EndEffects(rng.normal(size=(ROWS, TOKENS)), torch.from_numpy(sketch).float(), 0.5)


def exact_gram(effects: EndEffects) -> Array:
    sketch = effects.sketch.double().numpy()
    return np.asarray(sketch @ sketch.T / TOKENS, dtype=np.float64)


def make_profile(effects: EndEffects) -> Profile:
    linear, factor, truncation = menu_effects(effects, SHARES)
    fidelities = make_fidelities(MENU)
    return Profile(
        "output",
        LAYERS,
        fidelities,
        CONTEXT,
        effects.context_loss,
        linear,
        factor,
        truncation,
        TOKENS,
        "a",
        "b",
    )


def ends(values: Array) -> Array:
    """Return the columns of both ends of each layer, [..., 2 L] of [..., L * K]."""
    split = values.reshape(*values.shape[:-1], len(LAYERS), -1)
    return split[..., [0, -1]].reshape(*values.shape[:-1], ROWS)


@PROPERTY
@given(seed=st.integers(0, 10**6), layers=st.integers(1, 5), context=st.integers(1, MENU - 2))
def test_effects_fall_towards_the_context_and_rise_after_it(
    seed: int, layers: int, context: int
) -> None:
    shares = interpolation(falling_errors(seed, layers), context)
    assert shares.shape == (layers, MENU, 2)
    assert (shares[:, 0] == (1, 0)).all()
    assert (shares[:, context] == 0).all()
    assert (shares[:, -1] == (0, 1)).all()
    assert (np.diff(shares[:, : context + 1, 0]) < 0).all()
    assert (np.diff(shares[:, context:, 1]) > 0).all()
    assert (shares.min(axis=2) == 0).all()


@PROPERTY
@given(
    seed=st.integers(0, 10**6),
    layers=st.integers(1, 5),
    context=st.none() | st.integers(1, MENU - 2),
)
def test_shares_of_noisy_errors_lie_between_0_and_1(
    seed: int, layers: int, context: int | None
) -> None:
    shares = interpolation(np.random.default_rng(seed).uniform(0, 1, (layers, MENU)), context)
    assert ((shares >= 0) & (shares <= 1)).all()
    assert (shares.min(axis=2) == 0).all()


def test_a_share_is_the_part_of_the_error_change_from_the_context_to_the_end() -> None:
    error = np.array([[10.0, 8.0, 4.0, 2.0, 1.5, 1.0, 0.0], [7.0, 6.0, 5.0, 3.0, 2.0, 2.0, 1.0]])
    shares = interpolation(error, 3)
    np.testing.assert_allclose(
        shares[:, :, 0], [[1, 0.75, 0.25, 0, 0, 0, 0], [1, 0.75, 0.5, 0, 0, 0, 0]]
    )
    np.testing.assert_allclose(
        shares[:, :, 1], [[0, 0, 0, 0, 0.25, 0.5, 1], [0, 0, 0, 0, 0.5, 0.5, 1]]
    )


def test_an_error_beyond_an_end_counts_as_the_end() -> None:
    shares = interpolation(np.array([[3.0, 4.0, 2.0, 0.5, 1.0]]), 2)
    assert shares[0].tolist() == [[1, 0], [1, 0], [0, 0], [0, 1], [0, 1]]


@pytest.mark.parametrize(
    "error", [[3.0, 2.5, 1.0, 0.75, 2.0], [1.5, 2.5, 2.0, 1.75, 1.0]], ids=["worse", "better"]
)
def test_where_both_ends_are_worse_than_the_context_or_both_better_one_of_them_is_used(
    error: list[float],
) -> None:
    shares = interpolation(np.array([error]), 2)[0]
    towards = 1 if error[-1] > error[2] else 3  # the fidelity on the ends' side of the context
    assert (shares[towards] > 0).sum() == 1
    assert (shares[4 - towards] == 0).all()
    assert shares[[0, -1]].tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize("context", [0, MENU - 1])
def test_a_context_at_an_end_of_the_menu_has_no_effect_either(context: int) -> None:
    shares = interpolation(falling_errors(0), context)
    side = 1 if context == 0 else 0
    assert (shares[:, context] == 0).all()
    assert (shares[:, :, 1 - side] == 0).all()
    assert (shares[:, MENU - 1 - context, side] == 1).all()


@PROPERTY
@given(seed=st.integers(0, 10**6), context=st.integers(1, MENU - 2))
def test_each_layer_is_interpolated_on_its_own_and_in_any_unit(seed: int, context: int) -> None:
    error = falling_errors(seed)
    shares = interpolation(error, context)
    for row in range(len(error)):
        np.testing.assert_allclose(
            interpolation(error[[row]] * 1e-6, context)[0], shares[row], rtol=1e-9, atol=1e-9
        )


@PROPERTY
@given(seed=st.integers(0, 10**6), layers=st.integers(1, 5))
def test_from_the_original_all_errors_lie_on_the_way_to_the_low_end(seed: int, layers: int) -> None:
    error = falling_errors(seed, layers)
    shares = interpolation(error, None)
    np.testing.assert_allclose(shares[:, :-1, 0], (error / error[:, [0]])[:, :-1])
    assert (shares[:, :-1, 1] == 0).all()
    assert (shares[:, -1] == (0, 1)).all()  # which was measured itself


@pytest.mark.parametrize("context", [0, CONTEXT, MENU - 1])
def test_fidelities_of_the_same_error_have_no_effect(context: int) -> None:
    shares = interpolation(np.full((3, MENU), 0.5), context)
    assert (shares[:, 1:-1] == 0).all()


@pytest.mark.parametrize("decay", DECAYS)
def test_single_changes_to_the_ends_keep_their_measured_loss_at_any_rank(decay: float) -> None:
    effects = make_effects(decay)
    measured = effects.first.mean(axis=1) + np.diag(exact_gram(effects)) / 2
    np.testing.assert_allclose(ends(make_profile(effects).damage().ravel()), measured, rtol=1e-5)


def test_the_factor_is_that_of_the_products_between_layers() -> None:
    effects = make_effects(0.5)
    profile = make_profile(effects)
    expected, truncation = between_layers(exact_gram(effects), 2)
    found = ends(profile.factor)
    np.testing.assert_allclose(found, expected, atol=1e-5)  # sketches have single precision
    assert profile.truncation == pytest.approx(truncation, abs=1e-4)


@pytest.mark.parametrize("decay", [0.0, 3.0])
def test_a_part_of_a_change_has_that_part_of_its_loss(decay: float) -> None:
    damage = make_profile(make_effects(decay)).damage()
    expected = SHARES[:, :, 0] * damage[:, [0]] + SHARES[:, :, 1] * damage[:, [-1]]
    assert ((SHARES[:, 1] > 0) & (SHARES[:, 1] < 1)).any()
    np.testing.assert_allclose(damage, expected, atol=1e-9)


def test_a_part_of_a_change_has_that_part_of_its_coupling_with_other_layers() -> None:
    profile = make_profile(make_effects(0.5))
    gram = (profile.factor.T @ profile.factor).reshape(len(LAYERS), MENU, len(LAYERS), MENU)
    (low, _), (_, high) = SHARES[0, 1], SHARES[0, -2]
    assert 0 < low < 1
    assert 0 < high < 1
    np.testing.assert_allclose(gram[0, 1, 1:], low * gram[0, 0, 1:], atol=1e-12)
    np.testing.assert_allclose(gram[0, -2, 1:], high * gram[0, -1, 1:], atol=1e-12)


def test_the_context_has_no_effect() -> None:
    profile = make_profile(make_effects(0.5))
    assert not profile.linear[:, CONTEXT].any()
    assert not profile.factor.reshape(-1, *profile.linear.shape)[:, :, CONTEXT].any()


def test_changes_without_effect_give_zeros() -> None:
    profile = make_profile(
        EndEffects(np.zeros((ROWS, TOKENS)), torch.zeros(ROWS, TOKENS * WIDTH), 0.5)
    )
    assert not profile.linear.any()
    assert not profile.factor.any()
    assert profile.truncation == 0
