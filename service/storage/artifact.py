"""Artifacts: the files of a place, and the manifest that lists them.

A place is a kind and a name, such as `jobs/job_123`. Each put of files there has an id of its own,
and each file is stored under the hash of its content.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantizer.durable import file_sha256
from service.errors import ArtifactDamaged, RequestError

MANIFEST = "manifest.json"

_PLACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}/[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
_NAME_PART = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._+@=~-]{1,255}")
_MAX_NAME_CHARACTERS = 1000
_PUT = re.compile(r"put_([0-9a-f]{14})[0-9a-f]{12}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Artifact:
    """One file of a place.

    Attributes:
        name: relative path, such as `model.safetensors` or `report/index.html`.
        sha256: hexadecimal hash of its content.
        size_bytes: size of its content.
    """

    name: str
    sha256: str
    size_bytes: int

    @classmethod
    def of(cls, name: str, content: Path | bytes) -> "Artifact":
        """Return the artifact that a content becomes under a name.

        Raises:
            RequestError: the file cannot be read.
        """
        if isinstance(content, bytes):
            return cls(name, hashlib.sha256(content).hexdigest(), len(content))
        try:
            if not content.is_file():
                raise FileNotFoundError(content)
            return cls(name, file_sha256(content), content.stat().st_size)
        except OSError as error:
            raise RequestError(
                f"{str(content)!r} cannot be read as the file {name!r}; give a file that exists"
            ) from error


@dataclass(frozen=True, slots=True)
class Manifest:
    """The files that one put made all of a place.

    Attributes:
        put: id of the put, which begins with the time it was made.
        artifacts: its files, by name.
    """

    put: str
    artifacts: tuple[Artifact, ...]

    def key(self, place: str, artifact: Artifact) -> str:
        """Return the key under which the content of an artifact is stored."""
        return f"{place}/{self.put}/{artifact.sha256}"

    def dumps(self) -> bytes:
        """Return the manifest as JSON."""
        document = {"put": self.put, "files": [asdict(artifact) for artifact in self.artifacts]}
        return (json.dumps(document, indent=1) + "\n").encode()

    @classmethod
    def loads(cls, place: str, data: bytes) -> "Manifest":
        """Return the manifest of a place from its JSON.

        Raises:
            ArtifactDamaged: it cannot be read.
        """
        try:
            return cls._from_json(json.loads(data))
        except (ValueError, KeyError, TypeError, AttributeError, RequestError) as error:
            raise ArtifactDamaged(
                f"the manifest of {place} cannot be read; delete the place and put its files again"
            ) from error

    @classmethod
    def _from_json(cls, document: dict[str, Any]) -> "Manifest":
        manifest = cls(document["put"], tuple(Artifact(**file) for file in document["files"]))
        check_names([artifact.name for artifact in manifest.artifacts])
        is_valid = all(
            _SHA256.fullmatch(each.sha256) and isinstance(each.size_bytes, int)
            for each in manifest.artifacts
        )
        if not is_valid or not is_put(manifest.put):
            raise ValueError(document)
        return manifest


def is_put(text: str) -> bool:
    """Return whether a text is the id of a put."""
    return _PUT.fullmatch(text) is not None


def put_microseconds(put: str) -> int:
    """Return when a put was made, in microseconds since 1970, UTC."""
    return int(put[4:18], 16)


def check_place(place: str) -> None:
    """Refuse what is no place.

    Raises:
        RequestError: it is not a kind and a name.
    """
    if not _PLACE.fullmatch(place):
        raise RequestError(
            f"{place[:80]!r} is no place; use a kind and a name of letters, digits, '_' and '-', "
            "as in 'jobs/job_1'"
        )


def check_names(names: Iterable[str]) -> None:
    """Refuse names that cannot all be those of files in one folder.

    Raises:
        RequestError: there are none, one is not plain, or one lies below another.
    """
    known = set(names)
    if not known:
        raise RequestError("there are no files to put; give at least one")
    for name in known:
        parts = name.split("/")
        is_plain = all(_NAME_PART.fullmatch(part) for part in parts)
        if len(name) > _MAX_NAME_CHARACTERS or not is_plain:
            raise RequestError(
                f"{name[:80]!r} is no name of a file here; use parts of letters, digits and "
                "'._+@=~-' between '/'"
            )
        if any("/".join(parts[:length]) in known for length in range(1, len(parts))):
            raise RequestError(f"{name!r} lies below another file; give it another name")
