"""What is kept in the cache: finished stages, parts of unfinished ones, converted models."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.storage.unfinished_runs import FOLDER as RUNS
from service.storage.unfinished_runs import used_places

MANIFEST = "manifest.json"
WORK_SUFFIX = ".work"
MODELS = "models"
"""Folder of converted models; no stage is called so."""


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """One stage, or one converted model.

    Attributes:
        place: what it is called: `<stage>/<key>`.
        model: name of its model; empty where that is not recorded.
        size_bytes: size of its files, or of the parts of a stage that is not finished.
        used_at: when it was last used, in seconds since 1970.
        finished: whether it is complete.
        in_run: whether a run that has not ended uses it.
    """

    place: str
    model: str
    size_bytes: int
    used_at: float
    finished: bool
    in_run: bool

    @property
    def stage(self) -> str:
        """Name of the stage, or `models`."""
        return self.place.partition("/")[0]


def read_entries(root: Path) -> list[CacheEntry]:
    """Return everything in the cache, the least recently used first."""
    used = used_places(root)
    found = [
        read_entry(root, f"{parent.name}/{name}", used)
        for parent in _folders(root)
        if parent.name != RUNS
        for name in sorted({path.name.removesuffix(WORK_SUFFIX) for path in _folders(parent)})
    ]
    return sorted((entry for entry in found if entry is not None), key=lambda each: each.used_at)


def _folders(parent: Path) -> Iterator[Path]:
    """Yield the folders in a folder, but for those that are being created or removed."""
    for path in parent.iterdir():
        if path.is_dir() and not path.name.startswith("."):
            yield path


def read_entry(root: Path, place: str, used: Mapping[str, str]) -> CacheEntry | None:
    """Return the entry at a place, None if there is none.

    Args:
        root: folder of the cache.
        place: what the entry is called.
        used: places that unfinished runs use, see `used_places`.
    """
    folder = root / place
    manifest = _manifest(folder)
    finished = manifest is not None or folder.parent.name == MODELS
    files = folder if finished else folder.with_name(folder.name + WORK_SUFFIX)
    try:
        used_at = (files / MANIFEST if manifest else files).stat().st_mtime
    except FileNotFoundError:
        return None
    size = (manifest or {}).get("bytes")
    return CacheEntry(
        place=place,
        model=str((manifest or {}).get("model") or used.get(place, "")),
        size_bytes=size if isinstance(size, int) else _size(files),
        used_at=used_at,
        finished=finished,
        in_run=place in used,
    )


def _manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a finished stage; None if there is none that can be read."""
    try:
        document = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None


def _size(folder: Path) -> int:
    """Return the size of all files below a folder, as far as they are still there."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total
