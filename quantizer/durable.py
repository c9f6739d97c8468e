"""Files and folders that are complete or absent, whatever kills the process that writes them.

Everything is written to a temporary sibling, flushed to disk, and renamed; then the parent folder
is flushed, so that the rename itself survives a power cut.
"""

import hashlib
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from quantizer.known_error import KnownError

log = logging.getLogger("bitwright")

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all) as work goes on."""

_DIGEST_BYTES = hashlib.sha256().digest_size
_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")
"""How libraries in Rust, such as safetensors and tokenizers, quote the operating system."""


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to; afterwards flush the file and rename it to `path`.

    A reader sees the old content or the new one, never a part. If the block fails, the old content
    stays and the temporary file is removed.

    Args:
        path: the file to create or replace; its folder must exist.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        sync_path(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_path(path.parent)


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` as `atomic_file` does."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """Raise an `OSError` where a library reports an error of the operating system as its own.

    safetensors and tokenizers do so, for instance on a full disk.

    Args:
        path: what is written, for the message.

    Raises:
        OSError: with the number that the operating system gave.
    """
    try:
        yield
    except (OSError, KnownError):
        raise
    except Exception as err:
        quoted = _SYSTEM_ERROR.search(str(err))
        if quoted is None:
            raise
        raise OSError(int(quoted[1]), str(err), str(path)) from err


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder to fill; afterwards flush all files in it and rename it to `path`.

    If the block fails, `path` stays as it was and the temporary folder is removed. The temporary
    folder has a fixed name, so what a killed process left behind is removed at the next attempt;
    two processes must not create the same folder at once.

    Args:
        path: the folder to create; it must not exist, or be empty. Its parents are created.
    """
    temporary = path.with_name(f".{path.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        sync_tree(temporary)
        temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_path(path.parent)


def sync_tree(folder: Path) -> None:
    """Flush all files and folders below a folder, and the folder itself, to disk."""
    for path in folder.rglob("*"):
        sync_path(path)
    sync_path(folder)


def sync_path(path: Path) -> None:
    """Flush the content of a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class PartStore:
    """Finished parts of a long computation in one folder, from which it can be resumed."""

    def __init__(self, folder: Path) -> None:
        """Use `folder`, and create it if it is missing."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def read(self, name: str) -> bytes | None:
        """Return the part called `name`, or None if it is missing or damaged.

        Damage is logged.
        """
        path = self._folder / f"{name}.part"
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        digest, data = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if hashlib.sha256(data).digest() != digest:
            log.warning("stored part %s is damaged; it is computed again", path)
            return None
        return data

    def paths(self) -> list[Path]:
        """Return the files of all parts, sorted by name."""
        return sorted(self._folder.glob("*.part"))

    def write(self, name: str, data: bytes) -> None:
        """Store `data` as the part called `name`, with its SHA-256."""
        write_atomically(self._folder / f"{name}.part", hashlib.sha256(data).digest() + data)
