"""A profile is read exactly as it was written; damaged or impossible profiles are refused."""

import hashlib
import io
import json
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from allocator.errors import ProfileError
from allocator.profile import Profile, profile_digest
from tests.support.stored_profiles import FOLDER, NAMES, stored_profile
from tests.support.synthetic_profiles import make_profile

PROFILE = make_profile(1, layers=4, menu=5, rank=3)


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
def test_a_signal_must_be_a_name_and_a_context_an_index(
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
def test_truncated_arrays_are_refused(share: float) -> None:
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
    """Fails the test if it is ever unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a stored profile was unpickled",)


def test_a_pickle_is_refused_and_never_run() -> None:
    trap = np.empty((4, 5), dtype=object)
    trap[:] = _Trap()
    head, _ = PROFILE.dumps()
    for stored in (pickle.dumps(_Trap()), arrays(linear=trap, factor=PROFILE.factor)):
        with pytest.raises(ProfileError):
            Profile.loads(head, stored)
