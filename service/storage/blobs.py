"""Bytes by key, such as `jobs/job_1/manifest.json`, in a folder or in an S3 bucket.

What the artifact store stands on.
"""

import os
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote

from quantizer.durable import sync_folder
from service.errors import RequestError, StorageError
from service.storage.disk import disk_errors, link_or_copy

PIECE_BYTES = 1 << 20
"""Most bytes of one piece."""

_BLOCK_BYTES = 8 << 20
"""Bytes that one request gets from a bucket."""
_PART_BYTES, _MOST_PARTS, _PARTS_AT_ONCE = 8 << 20, 10_000, 4
"""How a large file goes to a bucket.

At most twice as many bytes as are under way at once are held in memory.
"""
_CONNECT_SECONDS, _ANSWER_SECONDS, _TRIES = 2, 60, 2

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")
_BUCKET = re.compile(
    r"s3://([A-Za-z0-9][A-Za-z0-9.-]{1,254})((?:/(?!\.{1,2}(?:/|$))[A-Za-z0-9._=-]+)*)/?"
)


class Blobs(Protocol):
    """Bytes by key. Every call may raise StorageError.

    A key that is not there is a FileNotFoundError.
    """

    def write(self, key: str, content: Path | bytes) -> None:
        """Write a file or bytes, so that readers see the old content or the new, even after a power cut."""

    def read(self, key: str) -> bytes:
        """Return all bytes of a small content."""

    def pieces(self, key: str, start: int, end: int) -> Iterator[bytes]:
        """Yield the bytes from `start` up to `end`; fewer where the content ends before."""

    def sizes(self, prefix: str) -> dict[str, int]:
        """Return the bytes of all contents below `prefix/`, by key, as they are now."""

    def remove(self, keys: Iterable[str]) -> None:
        """Remove contents; those that are not there are none to remove."""

    def check(self) -> None:
        """Make sure that keys can be listed."""


def open_blobs(url: str) -> Blobs:
    """Return what a URL names, see `service.storage.artifacts.ArtifactStore`.

    Raises:
        RequestError: it is no folder and no bucket.
        StorageError: the folder cannot be made.
    """
    scheme = _SCHEME.match(url)
    if scheme is None and url and "\0" not in url:
        return Folder(Path(url).absolute())
    if url.startswith("file:///") and "\0" not in unquote(url):
        return Folder(Path(unquote(url.removeprefix("file://"))))
    bucket = _BUCKET.fullmatch(url)
    if bucket is not None:
        return Bucket(bucket[1], bucket[2].strip("/"))
    begin = (
        f"begins with {scheme[0]!r}" if scheme else "is empty or no path"
    )  # the rest may hold a password
    raise RequestError(
        f"the artifact store's URL {begin}; use a folder, file:///path, or s3://bucket/prefix"
    )


class Folder:
    """Blobs as files under one folder."""

    def __init__(self, root: Path) -> None:
        """Use `root`, made if it is missing."""
        with told(root):
            root.mkdir(parents=True, exist_ok=True)
        self._root = root

    def write(self, key: str, content: Path | bytes) -> None:
        """See `Blobs`. A file is hard-linked where the file system can."""
        path = self._root / key
        with told(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with aside(path) as temporary:
                if isinstance(content, bytes):
                    temporary.write_bytes(content)
                else:
                    link_or_copy(content.resolve(), temporary)
            for folder in (path.parent, *path.parent.relative_to(self._root).parents):
                sync_folder(self._root / folder)

    def read(self, key: str) -> bytes:
        """See `Blobs`."""
        with told(self._root / key):
            return (self._root / key).read_bytes()

    def pieces(self, key: str, start: int, end: int) -> Iterator[bytes]:
        """See `Blobs`."""
        with told(self._root / key), (self._root / key).open("rb") as file:
            file.seek(start)
            while start < end and (piece := file.read(min(PIECE_BYTES, end - start))):
                start += len(piece)
                yield piece

    def sizes(self, prefix: str) -> dict[str, int]:
        """See `Blobs`."""
        found: dict[str, int] = {}
        with told(self._root / prefix):
            for folder, _, names in os.walk(self._root / prefix):
                for path in (Path(folder, name) for name in names):
                    with suppress(FileNotFoundError):  # deleted since it was listed
                        found[str(path.relative_to(self._root))] = path.stat().st_size
        return found

    def remove(self, keys: Iterable[str]) -> None:
        """See `Blobs`. Folders that become empty go too, but those of a key's first part, where others may begin to write."""
        paths = [self._root / key for key in keys]
        for path in paths:
            with told(path):
                path.unlink(missing_ok=True)
        for folder in {path.parent for path in paths}:
            with suppress(FileNotFoundError), told(folder):
                sync_folder(folder)
            for parent in (folder, *folder.parents)[
                : len(folder.relative_to(self._root).parts) - 1
            ]:
                with suppress(OSError):  # it is not empty, or gone already
                    parent.rmdir()

    def check(self) -> None:
        """See `Blobs`."""
        try:
            with disk_errors(self._root), os.scandir(self._root):
                pass
        except OSError as error:
            raise StorageError(
                f"{str(self._root)!r} cannot be listed: {error.strerror}; mount or make it"
            ) from error


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Turn errors of a file system into one sentence, but that a file is not there.

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
            f"{str(path)!r} cannot be used: {error.strerror or type(error).__name__}; see to the "
            "disk"
        ) from error


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Give another name in the same folder to write to, then flush what was written and rename it to `path`."""
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class Bucket:
    """Blobs as objects of a bucket, below a prefix.

    Uploads of one object are atomic by themselves.
    """

    def __init__(self, bucket: str, prefix: str) -> None:
        """Use a bucket; it is not asked for anything yet."""
        import fsspec  # type: ignore[import-untyped]  # noqa: PLC0415  who keeps files in a folder need not wait for it

        patience = {"connect_timeout": _CONNECT_SECONDS, "read_timeout": _ANSWER_SECONDS}
        retries = {"total_max_attempts": _TRIES, "mode": "standard"}
        self._bucket, self._root = bucket, f"{bucket}/{prefix}".rstrip("/")
        self._files: Any = fsspec.filesystem(
            "s3",
            use_listings_cache=False,
            skip_instance_cache=True,
            max_concurrency=1,
            config_kwargs={**patience, "retries": retries, "max_pool_connections": 32},
        )
        self._files.retries = _TRIES

    def write(self, key: str, content: Path | bytes) -> None:
        """See `Blobs`."""
        if isinstance(content, bytes):
            with self._told():
                self._files.pipe_file(self._at(key), content)
            return
        part_bytes = max(_PART_BYTES, -(-content.stat().st_size // _MOST_PARTS))
        with self._told():
            self._files.put_file(
                str(content), self._at(key), chunksize=part_bytes, max_concurrency=_PARTS_AT_ONCE
            )

    def read(self, key: str) -> bytes:
        """See `Blobs`."""
        with self._told():
            return bytes(self._files.cat_file(self._at(key)))

    def pieces(self, key: str, start: int, end: int) -> Iterator[bytes]:
        """See `Blobs`."""
        for offset in range(start, end, _BLOCK_BYTES):
            with self._told():
                block = self._files.cat_file(
                    self._at(key), start=offset, end=min(end, offset + _BLOCK_BYTES)
                )
            yield from (
                block[begin : begin + PIECE_BYTES] for begin in range(0, len(block), PIECE_BYTES)
            )

    def sizes(self, prefix: str) -> dict[str, int]:
        """See `Blobs`."""
        with self._told():
            found: dict[str, dict[str, Any]] = self._files.find(self._at(prefix), detail=True)
        return {
            path.removeprefix(f"{self._root}/"): int(info["size"]) for path, info in found.items()
        }

    def remove(self, keys: Iterable[str]) -> None:
        """See `Blobs`."""
        for key in list(keys):
            with self._told(), suppress(FileNotFoundError):
                self._files.rm_file(self._at(key))

    def check(self) -> None:
        """See `Blobs`."""
        with self._told():
            self._files.call_s3("list_objects_v2", Bucket=self._bucket, MaxKeys=1)

    def _at(self, key: str) -> str:
        return f"{self._root}/{key}"

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turn errors of the bucket into one sentence without what the server said, which may hold secrets."""
        from aiohttp import ClientError as ConnectionFault  # noqa: PLC0415  loaded by now
        from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped]  # noqa: PLC0415

        try:
            yield
        except (OSError, BotoCoreError, ClientError, ConnectionFault) as error:
            reason = _reason(error)
            if reason is None:
                raise
            raise StorageError(
                f"the bucket {self._bucket!r} of the artifact store {reason}"
            ) from error


def _reason(error: Exception) -> str | None:
    """Return what is wrong with a bucket and what to do; None where only a key is not there."""
    from botocore.exceptions import ConnectionError as NoConnection  # noqa: PLC0415
    from botocore.exceptions import HTTPClientError, NoCredentialsError, PartialCredentialsError  # noqa: PLC0415

    code = getattr(error.__cause__, "response", {}).get("Error", {}).get("Code", "")
    if code == "NoSuchKey":
        return None
    if code == "NoSuchBucket":
        return "does not exist; create it, or name another"
    if isinstance(error, PermissionError):
        return "refuses access; see to AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and its policy"
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return (
            "cannot be asked without credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if isinstance(error, NoConnection | HTTPClientError | TimeoutError):
        return "does not answer; see to AWS_ENDPOINT_URL and the network, then try again"
    return f"cannot be used ({code or type(error).__name__}); its server's log says more"
