"""A profile is read back as it was written, prices plans by its definition, and refuses what cannot be true."""

import hashlib
import io
import json
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.errors import ProfileError
from allocator.profile import COUPLINGS, Profile, profile_digest
from tests.support.stored_profiles import FOLDER, NAMES, stored_profile
from tests.support.synthetic_profiles import PROPERTY, make_profile, permuted

PROFILE = make_profile(1, layers=4, menu=5, rank=3)


def slow_loss(profile: Profile, choice: list[int]) -> float:
    """Return a plan's loss by the definition in `allocator.profile`, one pair of changes after the other."""
    gram = profile.factor.T @ profile.factor
    menu = len(profile.fidelities)
    loss = profile.context_loss
    for layer, option in enumerate(choice):
        loss += profile.linear[layer, option]
        for other, other_option in enumerate(choice):
            loss += gram[layer * menu + option, other * menu + other_option] / 2
    return float(loss)


def edited(**changes: Any) -> bytes:
    """Return the JSON document of a good profile with some fields replaced."""
    return json.dumps(json.loads(PROFILE.dumps()[0]) | changes).encode()


def arrays(**named: Any) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **named)
    return stream.getvalue()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"menu": 1},
        {"layers": 1, "rank": 7},
        {"spread": 12.0},
        {"silent": 5},
        {"rank": 0},
        {"in_original": True},
    ],
)
def test_reading_returns_exactly_what_was_written(options: dict[str, Any]) -> None:
    profile = make_profile(3, **options)
    again = Profile.loads(*profile.dumps())
    assert np.array_equal(again.linear, profile.linear)
    assert np.array_equal(again.factor, profile.factor)
    assert (again.linear.dtype, again.factor.dtype) == (np.float64, np.float64)
    assert replace(again, linear=profile.linear, factor=profile.factor) == profile


def test_the_document_says_what_was_measured() -> None:
    head = json.loads(PROFILE.dumps()[0])
    assert head["schema"] == "bitwright.profile/2"
    assert (head["signal"], head["context"]) == ("output", 2)
    assert head["model_sha256"] == PROFILE.model_sha256
    assert head["fidelities"] == [fidelity.name for fidelity in PROFILE.fidelities]
    assert [row["name"] for row in head["layers"]] == [layer.name for layer in PROFILE.layers]


def test_the_digest_covers_both_documents_and_where_the_first_ends() -> None:
    head, stored = PROFILE.dumps()
    assert profile_digest(b"ab", b"c") == hashlib.sha256(bytes(7) + b"\x02abc").hexdigest()
    assert profile_digest(b"ab", b"c") != profile_digest(b"a", b"bc")
    assert PROFILE.digest == profile_digest(head, stored)
    assert Profile.loads(head, stored).digest == PROFILE.digest
    assert replace(PROFILE, tokens=1).digest != PROFILE.digest


@pytest.mark.parametrize("name", NAMES)
def test_a_stored_profile_keeps_its_digest(name: str) -> None:
    head, stored = ((FOLDER / f"{name}.{kind}").read_bytes() for kind in ("json", "npz"))
    assert stored_profile(name).digest == profile_digest(head, stored)


@PROPERTY
@given(seed=st.integers(0, 100), choice=st.lists(st.integers(0, 4), min_size=4, max_size=4))
def test_loss_is_the_sum_over_all_pairs_of_changes(seed: int, choice: list[int]) -> None:
    profile = make_profile(seed, layers=4, menu=5, coupling=0.5)
    assert profile.loss(choice) == pytest.approx(slow_loss(profile, choice), rel=1e-12)
    assert profile.loss(np.array(choice, dtype=np.int64)) == profile.loss(choice)


@PROPERTY
@given(seed=st.integers(0, 100), choice=st.lists(st.integers(0, 4), min_size=4, max_size=4))
def test_without_a_factor_damages_just_add_up(seed: int, choice: list[int]) -> None:
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
def test_budgets_are_trusted_within_shares_of_the_context_that_the_signal_has(
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


def test_every_change_of_the_original_does_damage_from_nothing_on() -> None:
    profile = make_profile(1, layers=4, menu=5, in_original=True)
    for layer, option in np.ndindex(4, 5):
        share = np.zeros((4, 5))
        share[layer, option] = 1  # the other layers stay as they were
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
    """Return a profile of three blocks of two layers each, none beside the other layer of its block."""
    return permuted(
        make_profile(seed, layers=6, menu=5, rank=rank, coupling=0.5), [0, 2, 4, 3, 1, 5]
    )


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
    profile, choice = scattered(0, 3), [0, 0, 4, 4, 0, 4]
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


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("field", ["linear", "factor"])
def test_a_value_that_is_not_finite_names_its_layer(field: str, bad: float) -> None:
    broken = getattr(PROFILE, field).copy()
    broken[-1, 2 if field == "linear" else 2 * 5 + 1] = bad
    layer = PROFILE.layers[3 if field == "linear" else 2].name
    with pytest.raises(ProfileError, match=f"'{layer}' are not finite"):
        replace(PROFILE, **{field: broken})


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), "2.0", None])
def test_a_context_loss_that_is_no_finite_number_is_refused(loss: Any) -> None:
    with pytest.raises(ProfileError):
        Profile.loads(edited(context_loss=loss), PROFILE.dumps()[1])


@pytest.mark.parametrize(
    "changes",
    [
        {"linear": np.zeros((4, 4))},
        {"linear": np.zeros(20)},
        {"factor": np.zeros((3, 19))},
        {"factor": np.zeros(20)},
        {"factor": np.zeros((3, 4, 5))},
        {"layers": PROFILE.layers[:3]},
        {"fidelities": PROFILE.fidelities[:4]},
        {"context": 5},
        {"context": -1},
    ],
)
def test_shapes_that_disagree_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ProfileError):
        replace(PROFILE, **changes)


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"3",
        b'"text"',
        b"{}",
        edited(schema="bitwright.profile/1"),
        edited(layers=None),
    ],
)
def test_a_damaged_document_is_refused(head: bytes) -> None:
    with pytest.raises(ProfileError):
        Profile.loads(head, PROFILE.dumps()[1])


@pytest.mark.parametrize("name", json.loads(PROFILE.dumps()[0]))
def test_a_missing_field_is_refused(name: str) -> None:
    head = json.loads(PROFILE.dumps()[0])
    del head[name]
    with pytest.raises(ProfileError):
        Profile.loads(json.dumps(head).encode(), PROFILE.dumps()[1])


@pytest.mark.parametrize(
    "changes",
    [
        {"signal": 3},
        {"signal": None},
        {"signal": ["integral"]},
        {"context": 1.5},
        {"context": "2"},
        {"context": [2]},
    ],
    ids=str,
)
def test_a_signal_that_is_no_name_or_a_context_that_is_no_index_is_refused(
    changes: dict[str, Any],
) -> None:
    with pytest.raises(ProfileError):
        Profile.loads(edited(**changes), PROFILE.dumps()[1])


@pytest.mark.parametrize("fidelities", [["int3"] * 5, ["int2+4r0.5g63"] * 5, [3] * 5, "int3g64"])
def test_a_fidelity_that_does_not_exist_is_refused(fidelities: Any) -> None:
    with pytest.raises(ProfileError):
        Profile.loads(edited(fidelities=fidelities), PROFILE.dumps()[1])


@pytest.mark.parametrize(
    "stored",
    [
        b"no arrays",
        arrays(linear=PROFILE.linear),
        arrays(factor=PROFILE.factor),
        arrays(linear=PROFILE.linear, factor=PROFILE.factor[:, :3]),
        arrays(linear=np.full((4, 5), "x"), factor=PROFILE.factor),
        arrays(linear=np.full((4, 5), np.nan), factor=PROFILE.factor),
    ],
)
def test_damaged_arrays_are_refused(stored: bytes) -> None:
    with pytest.raises(ProfileError):
        Profile.loads(PROFILE.dumps()[0], stored)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.99])
def test_arrays_that_were_cut_off_are_refused(share: float) -> None:
    head, stored = PROFILE.dumps()
    with pytest.raises(ProfileError):
        Profile.loads(head, stored[: int(share * len(stored))])


def test_arrays_with_a_wrong_byte_are_refused_or_the_same() -> None:
    head, stored = PROFILE.dumps()
    for at in range(0, len(stored), 3):
        try:
            read = Profile.loads(head, stored[:at] + bytes([stored[at] ^ 0x55]) + stored[at + 1 :])
        except ProfileError:
            continue
        assert np.array_equal(read.linear, PROFILE.linear)
        assert np.array_equal(read.factor, PROFILE.factor)


class _Trap:
    """Ends the test if it is ever unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a stored profile was unpickled",)


def test_a_pickle_is_refused_and_never_run() -> None:
    trap = np.empty((4, 5), dtype=object)
    trap[:] = _Trap()
    head, _ = PROFILE.dumps()
    for stored in (pickle.dumps(_Trap()), arrays(linear=trap, factor=PROFILE.factor)):
        with pytest.raises(ProfileError):
            Profile.loads(head, stored)
