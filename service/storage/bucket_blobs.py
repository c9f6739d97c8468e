"""Blobs as objects of an S3 bucket.

Who keeps artifacts in a folder does not import this module: its libraries take long to load.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
from aiohttp import ClientError as ConnectionFault
from botocore import exceptions  # type: ignore[import-untyped]

from service.errors import StorageError
from service.storage.blobs import PIECE_BYTES

_BLOCK_BYTES = 8 << 20
"""Bytes that one request reads from a bucket."""

_PART_BYTES = 8 << 20
_MAX_PARTS = 10_000
_PARTS_AT_ONCE = 4
"""How a large file is uploaded. At most twice the bytes under way at once are held in memory."""

_CONNECT_SECONDS = 2
_ANSWER_SECONDS = 60
_TRIES = 2

_FAULTS = (OSError, exceptions.BotoCoreError, exceptions.ClientError, ConnectionFault)
"""What the client libraries raise."""


class BucketBlobs:
    """Blobs as objects of a bucket below a prefix, see `service.storage.blobs.Blobs`.

    S3 makes the upload of one object atomic.
    """

    def __init__(self, bucket: str, prefix: str) -> None:
        """Use a bucket; no request is sent yet."""
        timeouts = {"connect_timeout": _CONNECT_SECONDS, "read_timeout": _ANSWER_SECONDS}
        retries = {"total_max_attempts": _TRIES, "mode": "standard"}
        self._bucket = bucket
        self._root = f"{bucket}/{prefix}".rstrip("/")
        self._files: Any = fsspec.filesystem(
            "s3",
            use_listings_cache=False,
            skip_instance_cache=True,
            max_concurrency=1,
            config_kwargs={**timeouts, "retries": retries, "max_pool_connections": 32},
        )
        self._files.retries = _TRIES

    def write(self, key: str, content: Path | bytes) -> None:
        """See `Blobs`."""
        if isinstance(content, bytes):
            with self._storage_errors():
                self._files.pipe_file(self._at(key), content)
            return
        part_bytes = max(_PART_BYTES, -(-content.stat().st_size // _MAX_PARTS))
        with self._storage_errors():
            self._files.put_file(
                str(content), self._at(key), chunksize=part_bytes, max_concurrency=_PARTS_AT_ONCE
            )

    def read(self, key: str) -> bytes:
        """See `Blobs`."""
        with self._storage_errors():
            return bytes(self._files.cat_file(self._at(key)))

    def pieces(self, key: str, start: int, end: int) -> Iterator[bytes]:
        """See `Blobs`."""
        for offset in range(start, end, _BLOCK_BYTES):
            with self._storage_errors():
                block = self._files.cat_file(
                    self._at(key), start=offset, end=min(end, offset + _BLOCK_BYTES)
                )
            for begin in range(0, len(block), PIECE_BYTES):
                yield block[begin : begin + PIECE_BYTES]

    def sizes(self, prefix: str) -> dict[str, int]:
        """See `Blobs`."""
        with self._storage_errors():
            found: dict[str, dict[str, Any]] = self._files.find(self._at(prefix), detail=True)
        return {
            path.removeprefix(f"{self._root}/"): int(info["size"]) for path, info in found.items()
        }

    def remove(self, keys: Iterable[str]) -> None:
        """See `Blobs`."""
        for key in list(keys):
            with self._storage_errors(), suppress(FileNotFoundError):
                self._files.rm_file(self._at(key))

    def check(self) -> None:
        """See `Blobs`."""
        with self._storage_errors():
            self._files.call_s3("list_objects_v2", Bucket=self._bucket, MaxKeys=1)

    def _at(self, key: str) -> str:
        return f"{self._root}/{key}"

    @contextmanager
    def _storage_errors(self) -> Iterator[None]:
        """Turn errors of the bucket into one sentence.

        It repeats nothing of the server's answer, which may hold secrets.

        Raises:
            StorageError: instead of an error of the client libraries.
        """
        try:
            yield
        except _FAULTS as error:
            reason = _reason(error)
            if reason is None:
                raise
            raise StorageError(
                f"the bucket {self._bucket!r} of the artifact store {reason}"
            ) from error


def _reason(error: Exception) -> str | None:
    """Return what is wrong with a bucket and what to do; None where only a key does not exist."""
    code = getattr(error.__cause__, "response", {}).get("Error", {}).get("Code", "")
    if code == "NoSuchKey":
        return None
    if code == "NoSuchBucket":
        return "does not exist; create it, or name another"
    if isinstance(error, PermissionError):
        return "refuses access; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and its policy"
    if isinstance(error, exceptions.NoCredentialsError | exceptions.PartialCredentialsError):
        return "cannot be used without credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if isinstance(error, exceptions.ConnectionError | exceptions.HTTPClientError | TimeoutError):
        return "does not answer; check AWS_ENDPOINT_URL and the network, then try again"
    return f"cannot be used ({code or type(error).__name__}); see the log of its server"
