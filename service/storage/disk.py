"""Writing to disk, and what to do when the disk is full."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from quantizer.durable import system_errors
from service.errors import StorageError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_FICLONE = 0x40049409
"""The Linux request that makes a file share the blocks of another, see ioctl_ficlone(2)."""

_COPY_BYTES = 8 << 20


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn errors of a full or read-only disk into one sentence with the path and the next step.

    Errors count that a library reports as its own, see `quantizer.durable.system_errors`.

    Raises:
        StorageError: instead of such an OSError.
    """
    try:
        with system_errors(path):
            yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageError(
                f"no space left for {_place(error, path)!r}; finished work is kept: make room and "
                "run the same command again"
            ) from error
        if isinstance(error, PermissionError) or error.errno == errno.EROFS:
            raise StorageError(
                f"{str(path)!r} cannot be written: {error.strerror}; choose another place"
            ) from error
        raise


def make_folder(folder: Path) -> None:
    """Make a folder that a user named, with those above it; it may be there already.

    Raises:
        StorageError: it cannot be made.
    """
    try:
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"folder {str(folder)!r} cannot be made: {error.strerror}; choose another place"
        ) from error


def _place(error: OSError, path: Path) -> str:
    """Return where the disk is full: at the path that is written, or elsewhere.

    Downloads go into the cache of the hub, which may be on another disk.
    """
    named = error.filename
    if isinstance(named, str) and not Path(named).is_relative_to(path.parent):
        return named
    return str(path)


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source` where the file system can, else a flushed copy.

    An edit of one then changes the other, so neither may be handed to a user.
    """
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())


def copy_file(source: Path, target: Path) -> None:
    """Copy a file to `target`, which must not exist, with the permissions of a new file.

    Where the file system can (btrfs, XFS and others), the copy shares the blocks of the original
    until one of them is edited (reflink). An edit never changes the other file.
    """
    with source.open("rb") as reader, target.open("xb") as writer:
        if not _reflink(reader, writer):
            shutil.copyfileobj(reader, writer, _COPY_BYTES)


def _reflink(reader: BinaryIO, writer: BinaryIO) -> bool:
    """Make an empty file share the blocks of another.

    Return whether the file system can do that.
    """
    try:
        fcntl.ioctl(writer.fileno(), _FICLONE, reader.fileno())
    except OSError:
        return False
    return True
