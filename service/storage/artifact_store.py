"""Finished files at places in a folder or an S3 bucket; all files of a place appear at once.

    <place>/<put>/<sha256>    one file under the hash of its content; every put has its own folder
    <place>/manifest.json     names the valid put, with names, sizes and checksums of its files

A manifest is written last and replaced as a whole. So a place has all files of one put or does not
exist, whatever kills or overtakes the writing process. There are no locks: no put touches the files
of another one that is under way. Files of puts that were killed are removed with their place, or by
the first put that replaces the manifest at least `LEFTOVER_SECONDS` later. Multipart uploads to a
bucket that were cut off are not visible here; a lifecycle rule of the bucket ends them.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from service.errors import (
    ArtifactDamaged,
    ArtifactUnknown,
    RequestError,
    ServiceError,
    StorageError,
)
from service.failpoint import failpoint
from service.ids import new_id
from service.storage.artifact import (
    MANIFEST,
    Artifact,
    Manifest,
    check_names,
    check_place,
    is_put,
    put_microseconds,
)
from service.storage.blob_urls import open_blobs

log = logging.getLogger("bitwright")

LEFTOVER_SECONDS = 2 * 86400
"""Age at which a put without a manifest counts as dead."""


class ArtifactStore:
    """Files at places. Any number of processes and threads may share a store."""

    def __init__(self, url: str) -> None:
        """Use a folder, which is created if it is missing, or a bucket.

        Args:
            url: path of a folder, `file:///path`, or `s3://bucket/prefix`. Endpoint, region and
                credentials of a bucket come from the usual `AWS_...` variables.

        Raises:
            RequestError: the URL is none of these.
            StorageError: the folder cannot be created.
        """
        self._blobs = open_blobs(url)

    def put(self, place: str, files: Mapping[str, Path | bytes]) -> tuple[Artifact, ...]:
        """Make `files` all that is at a place, at once, and return them by name.

        If the same files are there already, nothing is done. A file may be hard-linked instead of
        copied, so it must not be changed in place afterwards.

        Raises:
            RequestError: a name or place is not plain, a source cannot be read, or there are no
                files.
            StorageError: the store cannot be written; the place keeps its earlier files.
        """
        check_place(place)
        check_names(files)
        artifacts = tuple(Artifact.of(name, files[name]) for name in sorted(files))
        if self._has(place, artifacts):
            return artifacts
        manifest = Manifest(new_id("put"), artifacts)
        try:
            self._write_files(place, manifest, files)
        except Exception:
            with suppress(ServiceError):
                self._remove(f"{place}/{manifest.put}")
            raise
        failpoint("artifact-written")
        before = self._manifest_or_none(place)
        self._write(f"{place}/{MANIFEST}", manifest.dumps())
        failpoint("artifact-listed")
        self._settle(place, manifest, before)
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
            ArtifactUnknown: the place does not have this content any more. Like the error above,
                it is raised before the first piece.
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
        return self._pieces(manifest.key(place, artifact), artifact.name, start, last)

    def read(self, place: str, name: str) -> bytes:
        """Return a file, whole and verified.

        Raises:
            ArtifactUnknown: it is not there.
            ArtifactDamaged: its bytes differ from its checksum.
            StorageError: the store does not answer.
        """
        artifact, manifest = self._locate(place, name)
        return b"".join(self._verified(manifest.key(place, artifact), artifact))

    def exists(self, place: str) -> bool:
        """Return whether a place has a manifest that can be read.

        Raises:
            StorageError: the store does not answer.
        """
        check_place(place)
        return self._manifest_or_none(place) is not None

    def delete(self, place: str) -> None:
        """Delete all that is at a place, the manifest first. A place may be missing already.

        Raises:
            StorageError: the store cannot be written.
        """
        check_place(place)
        while True:  # a put meanwhile may have written its manifest again
            self._blobs.remove([f"{place}/{MANIFEST}"])
            left = self._blobs.sizes(place)
            if not left:
                return
            self._blobs.remove(left)

    def check(self) -> None:
        """Check that the store can be listed.

        Raises:
            StorageError: it cannot, and why.
        """
        self._blobs.check()

    def _manifest(self, place: str) -> Manifest:
        check_place(place)
        try:
            data = self._blobs.read(f"{place}/{MANIFEST}")
        except FileNotFoundError as error:
            raise ArtifactUnknown(
                f"the artifact store has nothing at {place!r}; it was deleted, or does not exist "
                "yet"
            ) from error
        return Manifest.loads(place, data)

    def _manifest_or_none(self, place: str) -> Manifest | None:
        try:
            return self._manifest(place)
        except (ArtifactUnknown, ArtifactDamaged):
            return None

    def _locate(self, place: str, name: str) -> tuple[Artifact, Manifest]:
        manifest = self._manifest(place)
        for artifact in manifest.artifacts:
            if artifact.name == name:
                return artifact, manifest
        names = ", ".join(each.name for each in manifest.artifacts)
        raise ArtifactUnknown(f"{place} has no file {name[:80]!r}; it has {names}")

    def _has(self, place: str, artifacts: tuple[Artifact, ...]) -> bool:
        """Return whether all that is at a place are these files, whole."""
        manifest = self._manifest_or_none(place)
        if manifest is None or manifest.artifacts != artifacts:
            return False
        return not self._is_incomplete(place, manifest)

    def _is_incomplete(self, place: str, manifest: Manifest) -> bool:
        """Return whether a file of a manifest is missing, or has another size."""
        sizes = self._blobs.sizes(f"{place}/{manifest.put}")
        return any(
            sizes.get(manifest.key(place, artifact)) != artifact.size_bytes
            for artifact in manifest.artifacts
        )

    def _write_files(
        self, place: str, manifest: Manifest, files: Mapping[str, Path | bytes]
    ) -> None:
        contents = {
            manifest.key(place, artifact): files[artifact.name] for artifact in manifest.artifacts
        }
        for key, content in contents.items():
            self._write(key, content)
            failpoint("artifact-begun")
        if self._is_incomplete(place, manifest):
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

    def _settle(self, place: str, manifest: Manifest, before: Manifest | None) -> None:
        """Remove files that no manifest will name again.

        Withdraw the manifest if its files were deleted before it was written.
        """
        now = self._manifest_or_none(place)
        if now in (None, manifest) and self._is_incomplete(place, manifest):
            # another put may have come between the two looks, and removed the files
            now = self._manifest_or_none(place)
            if now in (None, manifest):
                self._blobs.remove([f"{place}/{MANIFEST}"])
                raise StorageError(
                    f"{place} was deleted while it was put; put it again if it is still wanted"
                )
        replaced = {each.put for each in (before, manifest) if each is not None and each != now}
        oldest = put_microseconds(manifest.put) - LEFTOVER_SECONDS * 1_000_000
        try:
            for put in self._puts(place):
                if put in replaced or put_microseconds(put) < oldest:
                    self._remove(f"{place}/{put}")
        except StorageError as error:
            log.warning("%s is stored, but its earlier files were not removed: %s", place, error)

    def _puts(self, place: str) -> set[str]:
        """Return the ids of all puts that have files at a place."""
        parts = (key.split("/")[2] for key in self._blobs.sizes(place))
        return {part for part in parts if is_put(part)}

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

    def _verified(self, key: str, artifact: Artifact) -> Iterator[bytes]:
        """Yield all pieces of a file, and raise at the end if they were not its content."""
        digest = hashlib.sha256()
        for piece in self._pieces(key, artifact.name, 0, artifact.size_bytes):
            digest.update(piece)
            yield piece
        if digest.hexdigest() != artifact.sha256:
            raise ArtifactDamaged(
                f"{artifact.name!r} at {key!r} differs from its checksum; delete its place and "
                "put it again"
            )
