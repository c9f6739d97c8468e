"""A profile predicts the loss of plans by its definition, with full or with less coupling."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.errors import ProfileError
from allocator.profile import COUPLINGS, Profile
from tests.support.synthetic_profiles import PROPERTY, make_profile, permuted

PROFILE = make_profile(1, layers=4, menu=5, rank=3)


def slow_loss(profile: Profile, choice: list[int]) -> float:
    """Return a plan's loss by the definition in `allocator.profile`, pair by pair."""
    gram = profile.factor.T @ profile.factor
    menu = len(profile.fidelities)
    loss = profile.context_loss
    for layer, option in enumerate(choice):
        loss += profile.linear[layer, option]
        for other, other_option in enumerate(choice):
            loss += gram[layer * menu + option, other * menu + other_option] / 2
    return float(loss)


@PROPERTY
@given(seed=st.integers(0, 100), choice=st.lists(st.integers(0, 4), min_size=4, max_size=4))
def test_loss_is_the_sum_over_all_pairs_of_changes(seed: int, choice: list[int]) -> None:
    profile = make_profile(seed, layers=4, menu=5, coupling=0.5)
    assert profile.loss(choice) == pytest.approx(slow_loss(profile, choice), rel=1e-12)
    assert profile.loss(np.array(choice, dtype=np.int64)) == profile.loss(choice)


@PROPERTY
@given(seed=st.integers(0, 100), choice=st.lists(st.integers(0, 4), min_size=4, max_size=4))
def test_without_a_factor_damages_add_up(seed: int, choice: list[int]) -> None:
    profile = make_profile(seed, layers=4, menu=5, rank=0)
    expected = profile.context_loss + sum(
        profile.damage()[layer, option] for layer, option in enumerate(choice)
    )
    assert profile.loss(choice) == pytest.approx(expected, rel=1e-12)


@PROPERTY
@given(seed=st.integers(0, 100), choice=st.lists(st.integers(0, 4), min_size=4, max_size=4))
def test_a_mix_of_one_fidelity_each_is_a_plan(seed: int, choice: list[int]) -> None:
    profile = make_profile(seed, layers=4, menu=5)
    assert profile.loss_of_shares(np.eye(5)[choice]) == profile.loss(choice)


def test_the_context_does_no_damage() -> None:
    damage = PROFILE.damage()
    assert np.array_equal(damage[:, 2], np.zeros(4))
    assert np.abs(np.delete(damage, 2, 1)).min() > 0
    assert PROFILE.loss([2] * 4) == PROFILE.context_loss


def test_damage_is_the_loss_of_each_single_change() -> None:
    for layer in range(4):
        for option in range(5):
            choice = [2] * 4
            choice[layer] = option
            assert PROFILE.damage()[layer, option] == pytest.approx(
                PROFILE.loss(choice) - PROFILE.context_loss, abs=1e-14
            )


def test_bytes_are_those_of_the_plan() -> None:
    choice = [4, 0, 2, 1]
    plan = PROFILE.plan(choice)
    assert plan.fidelities == tuple(PROFILE.fidelities[at] for at in choice)
    assert plan.layer_bytes == tuple(
        int(PROFILE.weight_bytes[layer, at]) for layer, at in enumerate(choice)
    )


@pytest.mark.parametrize(
    ("signal", "below", "above"),
    [("integral", 0.15, 0.45), ("output", 0.12, 0.12), ("of another version", 0.12, 0.12)],
)
def test_the_budget_range_is_the_reach_of_the_signal_around_the_context(
    signal: str, below: float, above: float
) -> None:
    middle = PROFILE.plan([2] * 4).weight_bytes
    low, high = replace(PROFILE, signal=signal).budget_range
    assert low < middle < high
    assert (low, high) == (
        pytest.approx(middle * (1 - below), abs=1),
        pytest.approx(middle * (1 + above), abs=1),
    )


def test_no_budget_is_near_the_original() -> None:
    profile = make_profile(1, layers=4, menu=5, in_original=True)
    assert profile.budget_range == (0, 0)
    assert profile.weight_bytes.min() > 0


def test_in_the_original_model_damage_is_the_loss_of_a_single_change() -> None:
    profile = make_profile(1, layers=4, menu=5, in_original=True)
    for layer, option in np.ndindex(4, 5):
        share = np.zeros((4, 5))
        share[layer, option] = 1  # the other layers are not quantized
        assert profile.loss_of_shares(share) == pytest.approx(profile.damage()[layer, option])
    assert profile.damage().min() > 0


def in_blocks(profile: Profile, choice: list[int], blocks: set[int]) -> list[int]:
    """Return the choice with the context in all layers outside of some blocks."""
    assert profile.context is not None
    return [
        at if layer.block in blocks else profile.context
        for layer, at in zip(profile.layers, choice, strict=True)
    ]


def scattered(seed: int, rank: int) -> Profile:
    """Return a profile of three blocks of two layers, in which no block's layers are adjacent."""
    profile = make_profile(seed, layers=6, menu=5, rank=rank, coupling=0.5)
    return permuted(profile, [0, 2, 4, 3, 1, 5])


RANKS = st.sampled_from([0, 1, 3, 40])
"""Below and above the ten columns of a block."""

CHOICES = st.lists(st.integers(0, 4), min_size=6, max_size=6)


@PROPERTY
@given(seed=st.integers(0, 100), rank=RANKS, coupling=st.sampled_from(COUPLINGS))
def test_single_changes_keep_their_damage_whatever_the_coupling(
    seed: int, rank: int, coupling: str
) -> None:
    profile = scattered(seed, rank)
    np.testing.assert_allclose(
        profile.with_coupling(coupling).damage(), profile.damage(), rtol=1e-9, atol=1e-12
    )


@PROPERTY
@given(seed=st.integers(0, 100), rank=RANKS, choice=CHOICES)
def test_no_coupling_adds_up_single_damages(seed: int, rank: int, choice: list[int]) -> None:
    profile = scattered(seed, rank)
    expected = profile.context_loss + profile.damage()[np.arange(6), choice].sum()
    assert profile.with_coupling("none").loss(choice) == pytest.approx(expected, rel=1e-9)
    assert profile.with_coupling("none").factor.shape == (0, 30)


@PROPERTY
@given(seed=st.integers(0, 100), rank=RANKS, choice=CHOICES, block=st.integers(0, 2))
def test_coupling_of_blocks_prices_changes_of_one_block_in_full(
    seed: int, rank: int, choice: list[int], block: int
) -> None:
    profile = scattered(seed, rank)
    inside = in_blocks(profile, choice, {block})
    assert profile.with_coupling("block").loss(inside) == pytest.approx(
        profile.loss(inside), rel=1e-9
    )


@PROPERTY
@given(seed=st.integers(0, 100), rank=RANKS, choice=CHOICES)
def test_coupling_of_blocks_adds_up_across_blocks(seed: int, rank: int, choice: list[int]) -> None:
    profile = scattered(seed, rank)
    extra = [
        profile.loss(in_blocks(profile, choice, {block})) - profile.context_loss
        for block in range(3)
    ]
    assert profile.with_coupling("block").loss(choice) == pytest.approx(
        profile.context_loss + sum(extra), rel=1e-9
    )


@PROPERTY
@given(seed=st.integers(0, 100), rank=RANKS)
def test_coupling_of_blocks_is_the_block_diagonal_part_of_the_full_one(
    seed: int, rank: int
) -> None:
    profile = scattered(seed, rank)
    blocks = np.repeat([layer.block for layer in profile.layers], 5)
    expected = np.where(blocks[:, None] == blocks, profile.factor.T @ profile.factor, 0)
    factor = profile.with_coupling("block").factor
    np.testing.assert_allclose(factor.T @ factor, expected, rtol=1e-9, atol=1e-12)


def test_couplings_differ_where_layers_couple() -> None:
    profile = scattered(0, 3)
    choice = [0, 0, 4, 4, 0, 4]
    losses = {round(profile.with_coupling(coupling).loss(choice), 6) for coupling in COUPLINGS}
    assert len(losses) == 3


def test_full_coupling_is_the_profile_itself() -> None:
    assert PROFILE.with_coupling("full") is PROFILE


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_coupling_changes_nothing_but_the_model_of_the_loss(coupling: str) -> None:
    changed = PROFILE.with_coupling(coupling)
    assert replace(changed, linear=PROFILE.linear, factor=PROFILE.factor) == PROFILE


@pytest.mark.parametrize("coupling", ["", "Full", "blocks", "layer"])
def test_an_unknown_coupling_is_named_with_those_that_exist(coupling: str) -> None:
    with pytest.raises(ProfileError, match=f"coupling {coupling!r} .* none, block, full"):
        PROFILE.with_coupling(coupling)
