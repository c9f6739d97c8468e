"""Fixtures of the commands that need a profile only.

One that is stored, and a latency table for it.
"""

from pathlib import Path

import pytest

from allocator.profile import Profile
from tests.support.profile_commands import KINDS, store
from tests.support.synthetic_profiles import make_decoder_profile


@pytest.fixture(scope="module")
def measured() -> Profile:
    """The profile of a small decoder."""
    return make_decoder_profile(3, KINDS, 2, menu=5)


@pytest.fixture
def folder(measured: Profile, tmp_path: Path) -> Path:
    """A folder with that profile."""
    return store(measured, tmp_path / "profile")


@pytest.fixture
def latency(measured: Profile, tmp_path: Path) -> Path:
    """A table in which the fidelities take 10, 20, 30, 40 and 50 microseconds a layer."""
    path = tmp_path / "latency.csv"
    rows = [
        f"*,{fidelity.name},{10 * at}" for at, fidelity in enumerate(measured.fidelities, start=1)
    ]
    path.write_text("\n".join(["layer,fidelity,latency_us", *rows]))
    return path
