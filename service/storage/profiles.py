"""Profiles by digest: immutable once they are on the shelf, and made ready for what-ifs once for each set of constraints."""

import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from allocator.answers.whatif import WhatIf
from allocator.demands.constraints import Constraints
from allocator.profile import Profile, profile_digest
from service.errors import ArtifactUnknown, ProfileUnknown, RequestError
from service.storage.artifacts import Artifact, ArtifactStore

READY = 64
"""What-ifs that are kept ready; of more, the one asked longest ago is forgotten."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
HEAD, ARRAYS = "profile.json", "profile.npz"


@dataclass(slots=True)
class _Ready:
    """A what-if, or the place where one thread makes it.

    The solver inside serves one question at a time.
    """

    lock: Lock = field(default_factory=Lock)
    whatif: WhatIf | None = None


class Shelf:
    """Profiles in an artifact store, each at a place of its own that is named by its digest."""

    def __init__(self, artifacts: ArtifactStore) -> None:
        """Keep them in `artifacts`."""
        self._artifacts = artifacts
        self._ready: OrderedDict[tuple[str, str, Constraints], _Ready] = OrderedDict()
        self._lock = Lock()

    def add(self, head: bytes, arrays: bytes) -> tuple[str, bool]:
        """Put a profile on the shelf; return its digest and whether it is new.

        Raises:
            ProfileError: it is damaged.
            StorageError: it cannot be written.
        """
        Profile.loads(head, arrays)
        digest = profile_digest(head, arrays)
        if self._artifacts.exists(_place(digest)):
            return digest, False
        self._artifacts.put(_place(digest), {HEAD: head, ARRAYS: arrays})
        return digest, True

    def find(self, digest: str, name: str) -> tuple[str, Artifact]:
        """Return the place of a profile, and one of its two files.

        Raises:
            ProfileUnknown: there is no such profile or file.
        """
        try:
            return _place(digest), self._artifacts.find(_place(digest), name)
        except ArtifactUnknown as error:
            raise ProfileUnknown(
                f"there is no profile {digest[:80]!r} with a file {name[:80]!r}; list them"
            ) from error

    def profile(self, digest: str) -> Profile:
        """Return a profile.

        Raises:
            ProfileUnknown: it is not there.
            ProfileError, ArtifactDamaged: it was damaged since.
        """
        self.find(digest, HEAD)
        return Profile.loads(
            *(self._artifacts.read(_place(digest), name) for name in (HEAD, ARRAYS))
        )

    def remove(self, digest: str) -> None:
        """Take a profile off the shelf; one that is not there is none to take."""
        with self._lock:
            for key in [key for key in self._ready if key[0] == digest]:
                del self._ready[key]
        self._artifacts.delete(_place(digest))

    @contextmanager
    def whatif(self, digest: str, coupling: str, constraints: Constraints) -> Iterator[WhatIf]:
        """Lend the what-if of a profile under constraints to one thread, making it ready first if it is not.

        Raises:
            ProfileUnknown: the profile is not there.
            AllocatorError: the constraints cannot be understood or met.
        """
        key = digest, coupling, constraints
        with self._lock:
            ready = self._ready.setdefault(key, _Ready())
            self._ready.move_to_end(key)
            while len(self._ready) > READY:
                self._ready.popitem(last=False)
        with ready.lock:
            if ready.whatif is None:
                ready.whatif = WhatIf(self.profile(digest).with_coupling(coupling), constraints)
            yield ready.whatif


def _place(digest: str) -> str:
    """Return where a profile is kept.

    Raises:
        ProfileUnknown: no profile could have this digest.
    """
    if not _DIGEST.fullmatch(digest):
        raise ProfileUnknown(f"there is no profile {digest[:80]!r}; list them, or import one")
    return f"profiles/{digest}"


def read_profile(folder: Path) -> Profile:
    """Return the profile in a folder that `bitwright profile` wrote.

    Raises:
        RequestError: a file cannot be read.
        ProfileError: the files are damaged.
    """
    try:
        head, arrays = ((folder / name).read_bytes() for name in ("profile.json", "profile.npz"))
    except OSError as error:
        raise RequestError(f"profile {str(folder)!r} cannot be read: {error}") from error
    return Profile.loads(head, arrays)
