"""Files out of the artifact store: whole, in part, or all of a place as one archive."""

import re
import tarfile
from base64 import b64encode
from collections.abc import Iterator, Sequence

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from service.storage.artifact import Artifact
from service.storage.artifact_store import ArtifactStore

FOREVER = "private, max-age=31536000, immutable"
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_PARTIAL, _NOT_MODIFIED, _NOT_SATISFIABLE = 206, 304, 416
_TYPES = {
    ".json": "application/json",
    ".html": "text/html; charset=utf-8",
    ".csv": "text/csv; charset=utf-8",
    ".txt": "text/plain",
}


def download(store: ArtifactStore, place: str, artifact: Artifact, request: Request) -> Response:
    """Return a file as a response.

    A range of it where one is asked for and it has not changed since, else all.

    The entity tag is the file's checksum, so that whoever goes on with a download gets the rest of
    the same file.
    """
    tag = f'"{artifact.sha256}"'
    headers = {
        "ETag": tag,
        "Accept-Ranges": "bytes",
        "Cache-Control": FOREVER,
        "Content-Security-Policy": "sandbox",
    }
    headers["Content-Disposition"] = f'attachment; filename="{artifact.name.rsplit("/", 1)[-1]}"'
    headers["Repr-Digest"] = f"sha-256=:{b64encode(bytes.fromhex(artifact.sha256)).decode()}:"
    sent = request.headers
    if tag in sent.get("if-none-match", ""):
        return Response(status_code=_NOT_MODIFIED, headers=headers)
    span = (
        _span(sent.get("range"), artifact.size_bytes) if sent.get("if-range", tag) == tag else None
    )
    kind = next(
        (kind for ending, kind in _TYPES.items() if artifact.name.endswith(ending)),
        "application/octet-stream",
    )
    if span is None:
        headers["Content-Length"] = str(artifact.size_bytes)
        return StreamingResponse(store.chunks(place, artifact), media_type=kind, headers=headers)
    start, end = span
    if start >= end:
        return Response(
            status_code=_NOT_SATISFIABLE,
            headers={"Content-Range": f"bytes */{artifact.size_bytes}"},
        )
    headers |= {
        "Content-Range": f"bytes {start}-{end - 1}/{artifact.size_bytes}",
        "Content-Length": str(end - start),
    }
    return StreamingResponse(store.chunks(place, artifact, start, end), _PARTIAL, headers, kind)


def _span(header: str | None, size_bytes: int) -> tuple[int, int] | None:
    """Return start and end of the one range that a header asks for.

    None where all is to be sent.
    """
    match = _RANGE.fullmatch(header.strip()) if header is not None and len(header) < 100 else None  # noqa: PLR2004
    if match is None or match.group(0) == "bytes=-":
        return None
    first, last = match.groups()
    if not first:
        return max(0, size_bytes - int(last)), size_bytes
    return int(first), min(size_bytes, int(last) + 1) if last else size_bytes


def archive(
    store: ArtifactStore, place: str, artifacts: Sequence[Artifact], folder: str
) -> Response:
    """Return all files of a place as one tar archive, which is made while it is sent.

    Equal places give equal archives.
    """
    sizes = [tarfile.BLOCKSIZE + _padded(artifact.size_bytes) for artifact in artifacts]
    total = sum(sizes) + 2 * tarfile.BLOCKSIZE
    headers = {
        "Content-Length": str(total),
        "Content-Disposition": f'attachment; filename="{folder}.tar"',
    }
    return StreamingResponse(
        _tar(store, place, artifacts, folder), media_type="application/x-tar", headers=headers
    )


def _tar(
    store: ArtifactStore, place: str, artifacts: Sequence[Artifact], folder: str
) -> Iterator[bytes]:
    for artifact in artifacts:
        entry = tarfile.TarInfo(f"{folder}/{artifact.name}")
        entry.size = artifact.size_bytes
        yield entry.tobuf(tarfile.GNU_FORMAT)
        yield from store.chunks(place, artifact)
        yield b"\0" * (_padded(artifact.size_bytes) - artifact.size_bytes)
    yield b"\0" * (2 * tarfile.BLOCKSIZE)


def _padded(size_bytes: int) -> int:
    return -(-size_bytes // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
