"""Profiles by digest: immutable once they are on the shelf, and made ready for what-ifs once for each set of constraints."""

import hashlib
import re
import shutil
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from allocator.constraints import Constraints
from allocator.profile import Profile
from allocator.whatif import WhatIf
from quantizer.durable import write_whole
from service.errors import ProfileUnknown
from service.store import disk_errors

READY = 64
"""What-ifs that are kept ready; of more, the one asked longest ago is forgotten."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
HEAD, ARRAYS = "profile.json", "profile.npz"


@dataclass(slots=True)
class _Ready:
    """A what-if, or the place where one thread makes it; the solver inside serves one question at a time."""

    lock: Lock = field(default_factory=Lock)
    whatif: WhatIf | None = None


class Shelf:
    """Profiles in a folder, each in a folder of its own that is named by its digest."""

    def __init__(self, root: Path) -> None:
        """Use `root`, which is made when something is put there."""
        self._root = root
        self._ready: OrderedDict[tuple[str, str, Constraints], _Ready] = OrderedDict()
        self._lock = Lock()

    def add(self, head: bytes, arrays: bytes) -> tuple[str, bool]:
        """Put a profile on the shelf; return its digest and whether it is new.

        Raises:
            ProfileError: it is damaged.
            StorageError: it cannot be written.
        """
        Profile.loads(head, arrays)
        digest = hashlib.sha256(len(head).to_bytes(8) + head + arrays).hexdigest()
        folder = self._root / digest
        if (folder / HEAD).is_file():
            return digest, False
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / ARRAYS, arrays)
            write_whole(folder / HEAD, head)  # last: without it the profile is not there
        return digest, True

    def digests(self) -> list[str]:
        """Return all digests, in order."""
        if not self._root.is_dir():
            return []
        return sorted(path.name for path in self._root.iterdir() if _DIGEST.fullmatch(path.name) and (path / HEAD).is_file())

    def file(self, digest: str, name: str) -> Path:
        """Return the path of one of the two files of a profile.

        Raises:
            ProfileUnknown: there is no such profile.
        """
        path = self._root / digest / name
        if not _DIGEST.fullmatch(digest) or name not in (HEAD, ARRAYS) or not (path.parent / HEAD).is_file():
            raise ProfileUnknown(f"there is no profile {digest[:80]!r}; list them, or import one")
        return path

    def profile(self, digest: str) -> Profile:
        """Return a profile.

        Raises:
            ProfileUnknown: it is not there.
            ProfileError: it was damaged since.
        """
        return Profile.loads(self.file(digest, HEAD).read_bytes(), self.file(digest, ARRAYS).read_bytes())

    def remove(self, digest: str) -> None:
        """Take a profile off the shelf.

        Raises:
            ProfileUnknown: it is not there.
        """
        head = self.file(digest, HEAD)
        with self._lock:
            for key in [key for key in self._ready if key[0] == digest]:
                del self._ready[key]
        with disk_errors(head):
            head.unlink(missing_ok=True)
            shutil.rmtree(head.parent, ignore_errors=True)

    @contextmanager
    def whatif(self, digest: str, coupling: str, constraints: Constraints) -> Iterator[WhatIf]:
        """Lend the what-if of a profile under constraints to one thread, making it ready first if it is not.

        Raises:
            ProfileUnknown: the profile is not there.
            AllocatorError: the constraints cannot be understood or met.
        """
        self.file(digest, HEAD)
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
