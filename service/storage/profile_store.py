"""Profiles by digest: they never change, and their what-ifs are prepared once."""

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
from service.storage.artifact import Artifact
from service.storage.artifact_store import ArtifactStore

MAX_WHATIFS = 64
"""What-ifs that are kept in memory. Beyond that, the least recently used one is dropped."""

HEAD = "profile.json"
ARRAYS = "profile.npz"
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(slots=True)
class _Entry:
    """A prepared what-if, or the place where one thread prepares it.

    The solver inside serves one question at a time, so a thread holds the lock while it asks.
    """

    lock: Lock = field(default_factory=Lock)
    whatif: WhatIf | None = None


class ProfileStore:
    """Profiles in an artifact store, each at a place of its own that is named by its digest."""

    def __init__(self, artifacts: ArtifactStore) -> None:
        """Keep profiles in `artifacts`."""
        self._artifacts = artifacts
        self._whatifs: OrderedDict[tuple[str, str, Constraints], _Entry] = OrderedDict()
        self._lock = Lock()

    def add(self, head: bytes, arrays: bytes) -> tuple[str, bool]:
        """Store a profile; return its digest and whether it is new.

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

    def get(self, digest: str) -> Profile:
        """Return a profile.

        Raises:
            ProfileUnknown: it does not exist.
            ProfileError, ArtifactDamaged: its files are damaged.
        """
        self.find(digest, HEAD)
        files = (self._artifacts.read(_place(digest), name) for name in (HEAD, ARRAYS))
        return Profile.loads(*files)

    def remove(self, digest: str) -> None:
        """Remove a profile, if it exists."""
        with self._lock:
            for key in [key for key in self._whatifs if key[0] == digest]:
                del self._whatifs[key]
        self._artifacts.delete(_place(digest))

    @contextmanager
    def whatif(self, digest: str, coupling: str, constraints: Constraints) -> Iterator[WhatIf]:
        """Lend the what-if of a profile under constraints to one thread at a time.

        It is prepared first unless it is in memory.

        Raises:
            ProfileUnknown: the profile does not exist.
            AllocatorError: the constraints cannot be understood or met.
        """
        key = digest, coupling, constraints
        with self._lock:
            entry = self._whatifs.setdefault(key, _Entry())
            self._whatifs.move_to_end(key)
            while len(self._whatifs) > MAX_WHATIFS:
                self._whatifs.popitem(last=False)
        with entry.lock:
            if entry.whatif is None:
                entry.whatif = WhatIf(self.get(digest).with_coupling(coupling), constraints)
            yield entry.whatif


def _place(digest: str) -> str:
    """Return where a profile is stored.

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
        head, arrays = ((folder / name).read_bytes() for name in (HEAD, ARRAYS))
    except OSError as error:
        raise RequestError(
            f"profile {str(folder)!r} cannot be read: {error.filename!r}: {error.strerror}; give a "
            "folder that `bitwright profile` wrote"
        ) from error
    return Profile.loads(head, arrays)
