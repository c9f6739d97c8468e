"""What the artifact store stands on: bytes by key, such as `jobs/job_1/manifest.json`."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

PIECE_BYTES = 1 << 20
"""Largest piece that `Blobs.pieces` yields."""


class Blobs(Protocol):
    """Bytes by key.

    Every call may raise StorageError. Reading a key that does not exist raises FileNotFoundError.
    """

    def write(self, key: str, content: Path | bytes) -> None:
        """Write a file or bytes.

        Readers see the old content or the new one, even after a power cut.
        """

    def read(self, key: str) -> bytes:
        """Return all bytes of a small content."""

    def pieces(self, key: str, start: int, end: int) -> Iterator[bytes]:
        """Yield the bytes from `start` up to `end`; fewer where the content ends before."""

    def sizes(self, prefix: str) -> dict[str, int]:
        """Return the size in bytes of all contents below `prefix/`, by key, as they are now."""

    def remove(self, keys: Iterable[str]) -> None:
        """Remove contents. Keys that do not exist are ignored."""

    def check(self) -> None:
        """Check that keys can be listed."""
