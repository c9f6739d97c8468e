"""Profiles of real models in the repository, as `bitwright profile` wrote them."""

from pathlib import Path

from allocator.profile import Profile

FOLDER = Path(__file__).parents[1] / "profiles"
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.json")))


def stored_profile(name: str) -> Profile:
    """Return the profile with this name in tests/profiles."""
    head = (FOLDER / f"{name}.json").read_bytes()
    arrays = (FOLDER / f"{name}.npz").read_bytes()
    return Profile.loads(head, arrays)
