"""Files that are whole or absent, whatever kills the process that writes them."""

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger("bitwright")

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all) as work goes on."""

_DIGEST_BYTES = hashlib.sha256().digest_size


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old content or the new, never a part, even after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class PartStore:
    """Finished parts of a long piece of work, kept in one folder so that the work can be taken up again."""

    def __init__(self, folder: Path) -> None:
        """Use `folder`, made if it is missing."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def read(self, name: str) -> bytes | None:
        """Return the part called `name`, or None where it is missing or damaged.

        Damage is logged.
        """
        path = self._folder / f"{name}.part"
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        digest, data = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if hashlib.sha256(data).digest() != digest:
            log.warning("stored part %s is damaged; it is made again", path)
            return None
        return data

    def paths(self) -> list[Path]:
        """Return the files of all parts, by name."""
        return sorted(self._folder.glob("*.part"))

    def write(self, name: str, data: bytes) -> None:
        """Keep `data` as the part called `name`."""
        write_atomically(self._folder / f"{name}.part", hashlib.sha256(data).digest() + data)
