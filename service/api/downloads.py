"""Files of the artifact store as responses: whole, in part, or all of a place as one archive."""

import re
import tarfile
from base64 import b64encode
from collections.abc import Iterator, Sequence

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from service.storage.artifact import Artifact
from service.storage.artifact_store import ArtifactStore

FOREVER = "private, max-age=31536000, immutable"
"""Value of `Cache-Control` for what never changes."""

_RANGE = re.compile(r"bytes=(\d{0,80})-(\d{0,80})")
_PARTIAL = 206
_NOT_MODIFIED = 304
_NOT_SATISFIABLE = 416
_MEDIA_TYPES = {
    ".json": "application/json",
    ".html": "text/html; charset=utf-8",
    ".csv": "text/csv; charset=utf-8",
    ".txt": "text/plain",
}

_END = b"\0" * (2 * tarfile.BLOCKSIZE)
"""End of a tar archive."""


def download(store: ArtifactStore, place: str, artifact: Artifact, request: Request) -> Response:
    """Return a file as a response: the range that is asked for, or all of it.

    The entity tag is the file's checksum. With `If-Range`, a client that resumes a download gets
    the rest of the same file, or all of the file if it has changed.
    """
    tag = f'"{artifact.sha256}"'
    headers = _headers(artifact, tag)
    sent = request.headers
    if tag in sent.get("if-none-match", ""):
        return Response(status_code=_NOT_MODIFIED, headers=headers)
    is_same = sent.get("if-range", tag) == tag
    span = _span(sent.get("range"), artifact.size_bytes) if is_same else None
    kind = _media_type(artifact.name)
    if span is None:
        headers["Content-Length"] = str(artifact.size_bytes)
        return StreamingResponse(store.chunks(place, artifact), media_type=kind, headers=headers)
    start, end = span
    if start >= end:
        outside = {"Content-Range": f"bytes */{artifact.size_bytes}"}
        return Response(status_code=_NOT_SATISFIABLE, headers=outside)
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{artifact.size_bytes}"
    headers["Content-Length"] = str(end - start)
    return StreamingResponse(store.chunks(place, artifact, start, end), _PARTIAL, headers, kind)


def _headers(artifact: Artifact, tag: str) -> dict[str, str]:
    file_name = artifact.name.rsplit("/", 1)[-1]
    digest = b64encode(bytes.fromhex(artifact.sha256)).decode()
    return {
        "ETag": tag,
        "Accept-Ranges": "bytes",
        "Cache-Control": FOREVER,
        "Content-Security-Policy": "sandbox",
        "Content-Disposition": f'attachment; filename="{file_name}"',
        "Repr-Digest": f"sha-256=:{digest}:",
    }


def _media_type(name: str) -> str:
    for ending, media_type in _MEDIA_TYPES.items():
        if name.endswith(ending):
            return media_type
    return "application/octet-stream"


def _span(header: str | None, size_bytes: int) -> tuple[int, int] | None:
    """Return start and end of the one range that a header asks for; None for the whole file."""
    match = None if header is None else _RANGE.fullmatch(header.strip())
    if match is None or match[0] == "bytes=-":
        return None
    first, last = match.groups()
    if not first:
        return max(0, size_bytes - int(last)), size_bytes
    return int(first), min(size_bytes, int(last) + 1) if last else size_bytes


def archive(
    store: ArtifactStore, place: str, artifacts: Sequence[Artifact], folder: str
) -> Response:
    """Return all files of a place as one tar archive, below `folder`.

    It is put together while it is sent. Equal places give equal archives.
    """
    entries = [_entry(f"{folder}/{artifact.name}", artifact.size_bytes) for artifact in artifacts]
    sizes = [
        len(entry) + artifact.size_bytes + _padding(artifact.size_bytes)
        for entry, artifact in zip(entries, artifacts, strict=True)
    ]
    headers = {
        "Content-Length": str(sum(sizes) + len(_END)),
        "Content-Disposition": f'attachment; filename="{folder}.tar"',
    }

    def parts() -> Iterator[bytes]:
        for entry, artifact in zip(entries, artifacts, strict=True):
            yield entry
            yield from store.chunks(place, artifact)
            yield b"\0" * _padding(artifact.size_bytes)
        yield _END

    return StreamingResponse(parts(), media_type="application/x-tar", headers=headers)


def _entry(name: str, size_bytes: int) -> bytes:
    """Return the header of one file in an archive."""
    entry = tarfile.TarInfo(name)
    entry.size = size_bytes
    return entry.tobuf(tarfile.GNU_FORMAT)


def _padding(size_bytes: int) -> int:
    """Return how many bytes fill the last block of a file."""
    return -size_bytes % tarfile.BLOCKSIZE
