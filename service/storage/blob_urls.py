"""From the URL of an artifact store to its blobs."""

import re
from pathlib import Path
from urllib.parse import unquote

from service.errors import RequestError
from service.storage.blobs import Blobs
from service.storage.folder_blobs import FolderBlobs

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")
_BUCKET = re.compile(
    r"s3://([A-Za-z0-9][A-Za-z0-9.-]{1,254})((?:/(?!\.{1,2}(?:/|$))[A-Za-z0-9._=-]+)*)/?"
)


def open_blobs(url: str) -> Blobs:
    """Return the blobs that a URL names, see `service.storage.artifact_store.ArtifactStore`.

    Raises:
        RequestError: it is neither a folder nor a bucket.
        StorageError: the folder cannot be created.
    """
    scheme = _SCHEME.match(url)
    if scheme is None and url and "\0" not in url:
        return FolderBlobs(Path(url).absolute())
    if url.startswith("file:///") and "\0" not in unquote(url):
        return FolderBlobs(Path(unquote(url.removeprefix("file://"))))
    bucket = _BUCKET.fullmatch(url)
    if bucket is not None:
        from service.storage.bucket_blobs import BucketBlobs  # noqa: PLC0415  loads slowly

        return BucketBlobs(bucket[1], bucket[2].strip("/"))
    # the rest of the URL may hold a password
    start = f"begins with {scheme[0]!r}" if scheme else "is empty or no path"
    raise RequestError(
        f"the artifact store's URL {start}; use a folder, file:///path, or s3://bucket/prefix"
    )
