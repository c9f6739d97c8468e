"""Blobs as files under one folder."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from quantizer.durable import atomic_file, sync_path
from service.errors import StorageError
from service.storage.blobs import PIECE_BYTES
from service.storage.disk import disk_errors, link_or_copy, make_folder


class FolderBlobs:
    """Blobs as files under one folder, see `service.storage.blobs.Blobs`."""

    def __init__(self, root: Path) -> None:
        """Use `root`, which is created if it is missing."""
        make_folder(root)
        self._root = root

    def write(self, key: str, content: Path | bytes) -> None:
        """See `Blobs`. A file is hard-linked where the file system can do that."""
        path = self._root / key
        with _storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as temporary:
                if isinstance(content, bytes):
                    temporary.write_bytes(content)
                else:
                    link_or_copy(content.resolve(), temporary)
            for folder in path.parent.relative_to(self._root).parents:
                sync_path(self._root / folder)

    def read(self, key: str) -> bytes:
        """See `Blobs`."""
        with _storage_errors(self._root / key):
            return (self._root / key).read_bytes()

    def pieces(self, key: str, start: int, end: int) -> Iterator[bytes]:
        """See `Blobs`."""
        with _storage_errors(self._root / key), (self._root / key).open("rb") as file:
            file.seek(start)
            while start < end and (piece := file.read(min(PIECE_BYTES, end - start))):
                start += len(piece)
                yield piece

    def sizes(self, prefix: str) -> dict[str, int]:
        """See `Blobs`."""
        found: dict[str, int] = {}
        with _storage_errors(self._root / prefix):
            for folder, _, names in os.walk(self._root / prefix):
                for path in (Path(folder, name) for name in names):
                    with suppress(FileNotFoundError):  # deleted since it was listed
                        found[str(path.relative_to(self._root))] = path.stat().st_size
        return found

    def remove(self, keys: Iterable[str]) -> None:
        """See `Blobs`.

        Folders that become empty are removed, except those of the first part of a key: another
        process may begin to write there.
        """
        paths = [self._root / key for key in keys]
        for path in paths:
            with _storage_errors(path):
                path.unlink(missing_ok=True)
        for folder in {path.parent for path in paths}:
            with suppress(FileNotFoundError), _storage_errors(folder):
                sync_path(folder)
            depth = len(folder.relative_to(self._root).parts)
            for parent in (folder, *folder.parents)[: depth - 1]:
                with suppress(OSError):  # it is not empty, or gone already
                    parent.rmdir()

    def check(self) -> None:
        """See `Blobs`."""
        try:
            with disk_errors(self._root), os.scandir(self._root):
                pass
        except OSError as error:
            raise StorageError(
                f"{str(self._root)!r} cannot be listed: {error.strerror}; mount or create it"
            ) from error


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    """Turn errors of the file system into one sentence, except for a file that does not exist.

    Raises:
        StorageError: instead of such an OSError.
    """
    try:
        with disk_errors(path):
            yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(
            f"{str(path)!r} cannot be used: {error.strerror or type(error).__name__}; check the "
            "disk"
        ) from error
