"""Finished files at places in a folder or an S3 bucket, all files of a place visible at once.

    <place>/<put>/<sha256>    one file under the hash of its content; every put has a folder of its own
    <place>/manifest.json     which put counts, with names, sizes and checksums of its files

A manifest is written last and replaced as a whole, so a place has all files of one put or is not
there, whatever kills or overtakes the process that writes. There are no locks: no put touches what
another one still writes. What killed puts left lying goes with their place, or when a put
`LEFTOVER_SECONDS` later replaces the manifest. Multipart uploads to a bucket that were cut off are
not seen here; a lifecycle rule of the bucket ends them.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantizer.durable import file_sha256
from service.errors import (
    ArtifactDamaged,
    ArtifactUnknown,
    RequestError,
    ServiceError,
    StorageError,
)
from service.failpoint import failpoint
from service.ids import new_id
from service.storage.blobs import open_blobs

log = logging.getLogger("bitwright")

MANIFEST = "manifest.json"
LEFTOVER_SECONDS = 2 * 86400
"""Age at which a put that has no manifest is taken for dead."""

_PLACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}/[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
_NAME_PART = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._+@=~-]{1,255}")
_MOST_NAME_CHARACTERS = 1000
_PUT = re.compile(r"put_([0-9a-f]{14})[0-9a-f]{12}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Artifact:
    """One file of a place.

    Attributes:
        name: relative, such as `model.safetensors` or `report/index.html`.
        sha256: hexadecimal hash of its content.
        size_bytes: of its content.
    """

    name: str
    sha256: str
    size_bytes: int


class ArtifactStore:
    """Files at places, each a kind and a name such as `jobs/job_123`.

    Any number of processes and threads may share a store.
    """

    def __init__(self, url: str) -> None:
        """Use a folder, made if it is missing, or a bucket.

        Args:
            url: path of a folder, `file:///path`, or `s3://bucket/prefix`, with endpoint, region
                and credentials out of the usual `AWS_...` variables.

        Raises:
            RequestError: it is none of these.
            StorageError: the folder cannot be made.
        """
        self._blobs = open_blobs(url)

    def put(self, place: str, files: Mapping[str, Path | bytes]) -> tuple[Artifact, ...]:
        """Make `files` all that is at a place, at once; return them by name.

        Where they are there already, nothing is done.

        A file may be hard-linked instead of copied, so it must not be changed in place afterwards.

        Raises:
            RequestError: a name or place is not plain, a source cannot be read, or there are no
                files.
            StorageError: the store cannot be written; what was at the place before stays.
        """
        _check_place(place)
        _check_names(files)
        artifacts = tuple(_describe(name, files[name]) for name in sorted(files))
        before = self._manifest_or_none(place)
        if (
            before is not None
            and before.artifacts == artifacts
            and not self._missing(place, before)
        ):
            return artifacts
        made = _Manifest(new_id("put"), artifacts)
        try:
            self._write_files(place, made, files)
        except Exception:
            with suppress(ServiceError):
                self._remove(f"{place}/{made.put}")
            raise
        failpoint("artifact-written")
        before = self._manifest_or_none(place)
        self._write(f"{place}/{MANIFEST}", made.dumps())
        failpoint("artifact-listed")
        self._settle(place, made, before)
        return artifacts

    def list(self, place: str) -> tuple[Artifact, ...]:
        """Return the files of a place by name.

        Raises:
            ArtifactUnknown: nothing is there.
            ArtifactDamaged: its manifest cannot be read.
            StorageError: the store does not answer.
        """
        return self._manifest(place).artifacts

    def find(self, place: str, name: str) -> Artifact:
        """Return one file of a place.

        Raises:
            ArtifactUnknown: it is not there.
            ArtifactDamaged, StorageError: as for `list`.
        """
        return self._locate(place, name)[0]

    def chunks(
        self, place: str, artifact: Artifact, start: int = 0, end: int | None = None
    ) -> Iterator[bytes]:
        """Return the bytes from `start` up to `end`, by default all, in pieces of at most 1 MiB.

        They are not verified.

        Raises:
            RequestError: the range is not within the file.
            ArtifactUnknown: the place has no such content now; as all before the first piece.
            ArtifactDamaged: the content is missing or too short.
            StorageError: the store does not answer.
        """
        last = artifact.size_bytes if end is None else end
        if not 0 <= start <= last <= artifact.size_bytes:
            raise RequestError(
                f"bytes {start} to {last} are not within the {artifact.size_bytes} bytes of "
                f"{artifact.name!r}"
            )
        manifest = self._manifest(place)
        if artifact.sha256 not in {each.sha256 for each in manifest.artifacts}:
            raise ArtifactUnknown(
                f"{place} has no {artifact.name!r} of this content any more; list it again"
            )
        return self._pieces(_key(place, manifest, artifact), artifact.name, start, last)

    def read(self, place: str, name: str) -> bytes:
        """Return a file, whole and verified.

        Raises:
            ArtifactUnknown: it is not there.
            ArtifactDamaged: its bytes differ from its checksum.
            StorageError: the store does not answer.
        """
        return b"".join(self._verified(place, *self._locate(place, name)))

    def exists(self, place: str) -> bool:
        """Return whether a place has a manifest that can be read.

        Raises:
            StorageError: the store does not answer.
        """
        _check_place(place)
        return self._manifest_or_none(place) is not None

    def delete(self, place: str) -> None:
        """Delete all that is at a place, the manifest first.

        A place that is not there is none to delete.

        Raises:
            StorageError: the store cannot be written.
        """
        _check_place(place)
        while True:  # a put that came between has its manifest here again
            self._blobs.remove([f"{place}/{MANIFEST}"])
            left = self._blobs.sizes(place)
            if not left:
                return
            self._blobs.remove(left)

    def check(self) -> None:
        """Make sure that the store can be listed.

        Raises:
            StorageError: it cannot, and why.
        """
        self._blobs.check()

    def _manifest(self, place: str) -> "_Manifest":
        _check_place(place)
        try:
            data = self._blobs.read(f"{place}/{MANIFEST}")
        except FileNotFoundError as error:
            raise ArtifactUnknown(
                f"there is nothing at {place!r} in the artifact store; it was deleted or not yet "
                "made"
            ) from error
        return _Manifest.loads(place, data)

    def _manifest_or_none(self, place: str) -> "_Manifest | None":
        try:
            return self._manifest(place)
        except (ArtifactUnknown, ArtifactDamaged):
            return None

    def _locate(self, place: str, name: str) -> "tuple[Artifact, _Manifest]":
        manifest = self._manifest(place)
        for artifact in manifest.artifacts:
            if artifact.name == name:
                return artifact, manifest
        raise ArtifactUnknown(
            f"{place} has no file {name[:80]!r}; it has "
            f"{', '.join(each.name for each in manifest.artifacts)}"
        )

    def _missing(self, place: str, manifest: "_Manifest") -> bool:
        """Return whether a file is not there, or not of its size."""
        sizes = self._blobs.sizes(f"{place}/{manifest.put}")
        return any(
            sizes.get(_key(place, manifest, artifact)) != artifact.size_bytes
            for artifact in manifest.artifacts
        )

    def _write_files(
        self, place: str, made: "_Manifest", files: Mapping[str, Path | bytes]
    ) -> None:
        contents = {
            _key(place, made, artifact): files[artifact.name] for artifact in made.artifacts
        }
        for key, content in contents.items():
            self._write(key, content)
            failpoint("artifact-begun")
        if self._missing(place, made):
            raise StorageError(
                f"{place} was not stored as given: files changed or were deleted meanwhile; put "
                "them again"
            )

    def _write(self, key: str, content: Path | bytes) -> None:
        try:
            self._blobs.write(key, content)
        except FileNotFoundError as error:
            raise StorageError(
                f"{key!r} could not be stored, as something was deleted meanwhile; put it again"
            ) from error

    def _settle(self, place: str, made: "_Manifest", before: "_Manifest | None") -> None:
        """Remove what no manifest will name again.

        Take the manifest back if its files were deleted before it came.
        """
        now = self._manifest_or_none(place)
        if (now is None or now == made) and self._missing(place, made):
            now = self._manifest_or_none(
                place
            )  # another put may have come between the two looks, and removed the files
            if now is None or now == made:
                self._blobs.remove([f"{place}/{MANIFEST}"])
                raise StorageError(
                    f"{place} was deleted while it was put; put it again if it is still wanted"
                )
        done_with = {each.put for each in (before, made) if each is not None and each != now}
        oldest = _microseconds(made.put) - LEFTOVER_SECONDS * 1_000_000
        try:
            found = {
                put
                for put in (key.split("/")[2] for key in self._blobs.sizes(place))
                if _PUT.fullmatch(put)
            }
            for put in found:
                if put in done_with or _microseconds(put) < oldest:
                    self._remove(f"{place}/{put}")
        except StorageError as error:
            log.warning("%s is stored, but what it had before was not removed: %s", place, error)

    def _remove(self, prefix: str) -> None:
        self._blobs.remove(self._blobs.sizes(prefix))

    def _pieces(self, key: str, name: str, start: int, end: int) -> Iterator[bytes]:
        given = 0
        try:
            for piece in self._blobs.pieces(key, start, end):
                given += len(piece)
                yield piece
        except FileNotFoundError as error:
            raise ArtifactDamaged(
                f"{name!r} at {key!r} is gone; try again if it was replaced just now, else put it "
                "again"
            ) from error
        if given != end - start:
            raise ArtifactDamaged(
                f"{name!r} at {key!r} ends {end - start - given} bytes early; delete its place "
                "and put it again"
            )

    def _verified(self, place: str, artifact: Artifact, manifest: "_Manifest") -> Iterator[bytes]:
        """Yield all pieces of a file, and raise at the end if they were not its content."""
        digest, key = hashlib.sha256(), _key(place, manifest, artifact)
        for piece in self._pieces(key, artifact.name, 0, artifact.size_bytes):
            digest.update(piece)
            yield piece
        if digest.hexdigest() != artifact.sha256:
            raise ArtifactDamaged(
                f"{artifact.name!r} at {key!r} differs from its checksum; delete its place and "
                "put it again"
            )


@dataclass(frozen=True, slots=True)
class _Manifest:
    put: str
    artifacts: tuple[Artifact, ...]

    def dumps(self) -> bytes:
        document = {"put": self.put, "files": [asdict(artifact) for artifact in self.artifacts]}
        return (json.dumps(document, indent=1) + "\n").encode()

    @classmethod
    def loads(cls, place: str, data: bytes) -> "_Manifest":
        try:
            return cls._of(json.loads(data))
        except (ValueError, KeyError, TypeError, AttributeError, RequestError) as error:
            raise ArtifactDamaged(
                f"the manifest of {place} cannot be read; delete the place and put its files again"
            ) from error

    @classmethod
    def _of(cls, document: dict[str, Any]) -> "_Manifest":
        manifest = cls(document["put"], tuple(Artifact(**file) for file in document["files"]))
        _check_names([artifact.name for artifact in manifest.artifacts])
        sound = all(
            _SHA256.fullmatch(each.sha256) and isinstance(each.size_bytes, int)
            for each in manifest.artifacts
        )
        if not sound or not _PUT.fullmatch(manifest.put):
            raise ValueError(document)
        return manifest


def _key(place: str, manifest: _Manifest, artifact: Artifact) -> str:
    return f"{place}/{manifest.put}/{artifact.sha256}"


def _microseconds(put: str) -> int:
    return int(put[4:18], 16)


def _check_place(place: str) -> None:
    if not _PLACE.fullmatch(place):
        raise RequestError(
            f"{place[:80]!r} is no place; use a kind and a name of letters, digits, '_' and '-', "
            "as in 'jobs/job_1'"
        )


def _check_names(names: Iterable[str]) -> None:
    """Make sure that all names can be those of files in one folder."""
    known = set(names)
    if not known:
        raise RequestError("there are no files to put; give at least one")
    for name in known:
        parts = name.split("/")
        if len(name) > _MOST_NAME_CHARACTERS or not all(
            _NAME_PART.fullmatch(part) for part in parts
        ):
            raise RequestError(
                f"{name[:80]!r} is no name of a file here; use parts of letters, digits and "
                "'._+@=~-' between '/'"
            )
        if any("/".join(parts[:length]) in known for length in range(1, len(parts))):
            raise RequestError(f"{name!r} lies below another file; give it another name")


def _describe(name: str, content: Path | bytes) -> Artifact:
    if isinstance(content, bytes):
        return Artifact(name, hashlib.sha256(content).hexdigest(), len(content))
    try:
        if not content.is_file():
            raise FileNotFoundError(content)
        return Artifact(name, file_sha256(content), content.stat().st_size)
    except OSError as error:
        raise RequestError(
            f"{str(content)!r} cannot be read as the file {name!r}; give a file that is there"
        ) from error
