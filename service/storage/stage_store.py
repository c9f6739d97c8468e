"""Finished stages on disk, each under the hash of exactly its own inputs.

    <root>/<stage>/<key>/            results, and manifest.json with a checksum of every file
    <root>/<stage>/<key>.work/       finished parts of a stage that was interrupted
    <root>/<stage>/<key>.lock        held while a process works on the stage
    <root>/models/                   models that were converted from GGUF
    <root>/runs/                     which stages the runs use that have not ended
    <root>/limit.json                how large all of it may become

A stage folder is written under another name, flushed, and renamed, so one that exists is complete.
Its checksums are compared whenever it is used; if one differs, the stage is run again.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from quantizer.durable import PartStore, atomic_folder, file_sha256
from service.storage.cache_entry import MANIFEST, WORK_SUFFIX
from service.storage.cache_limit import keep_limit
from service.storage.cache_removal import LOCK_SUFFIX
from service.storage.disk import disk_errors, make_folder
from service.storage.unfinished_runs import UnfinishedRun, place_of

log = logging.getLogger("bitwright")


@dataclass(frozen=True, slots=True)
class StageKey:
    """Names one stage with its inputs.

    Attributes:
        stage: such as `profile`.
        inputs: everything that decides the result, as JSON values; method names stand for the code.
    """

    stage: str
    inputs: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """Hash of stage and inputs, the name of the folder."""
        text = json.dumps(
            {"stage": self.stage, "inputs": self.inputs}, sort_keys=True, separators=(",", ":")
        )
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class StageStore:
    """All finished stages under one root folder.

    Attributes:
        root: folder of the cache; created if it is missing.
        run: the run that uses the store, whose stages stay until it ends.
        model: name of the model, for the manifests of its stages.
        used: places of what was asked for in this process, which stays, too.

    Raises:
        StorageError: the root cannot be created.
    """

    root: Path
    run: UnfinishedRun | None = None
    model: str = ""
    used: set[str] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        """Create the root."""
        make_folder(self.root)

    def for_model(self, name: str, folder: Path) -> "StageStore":
        """Return this store for the stages of one model.

        The model's folder stays until the run ends if it is in the store, as a converted model is.
        """
        store = replace(self, model=name)
        if folder.is_relative_to(self.root):
            with disk_errors(folder):
                store.note(folder)
        return store

    def note(self, folder: Path) -> None:
        """Record that a stage or a converted model is used."""
        self.used.add(place_of(self.root, folder))
        if self.run is not None:
            self.run.note(folder, self.model)

    def end_run(self) -> None:
        """Record that the run has ended, so that its stages may be removed."""
        if self.run is not None:
            with disk_errors(self.root):
                self.run.end()

    def get(self, key: StageKey, make: Callable[[Path, PartStore], None]) -> Path:
        """Return the folder of a finished stage, making it first unless it is there.

        Args:
            key: the stage and its inputs.
            make: fills an empty folder, given a store for finished parts that survive if it is
                interrupted.

        Raises:
            StorageError: the disk is full, or the root cannot be written.
        """
        folder = self.path(key)
        with disk_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}{LOCK_SUFFIX}"):
                self.note(folder)
                if self._is_whole(folder):
                    (folder / MANIFEST).touch()  # when it was last used
                    return folder
                self._make(folder, key, make)
            keep_limit(self.root, self.used)
        return folder

    def path(self, key: StageKey) -> Path:
        """Return where a stage is kept, whether it is there or not."""
        return self.root / key.stage / key.digest

    def _is_whole(self, folder: Path) -> bool:
        if not folder.is_dir():
            return False
        try:
            sums: dict[str, str] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))[
                "sha256"
            ]
            damaged = [
                name for name, digest in sums.items() if file_sha256(folder / name) != digest
            ]
        except (OSError, ValueError, KeyError, AttributeError):
            damaged = [MANIFEST]
        if damaged:
            log.warning("stored stage %s is damaged (%s); it is made again", folder, damaged[0])
        return not damaged

    def _make(self, folder: Path, key: StageKey, make: Callable[[Path, PartStore], None]) -> None:
        work = folder.with_name(folder.name + WORK_SUFFIX)
        if folder.exists():
            shutil.rmtree(folder)
        with atomic_folder(folder) as temporary:
            make(temporary, PartStore(work))
            files = sorted(path for path in temporary.rglob("*") if path.is_file())
            sums = {str(path.relative_to(temporary)): file_sha256(path) for path in files}
            manifest = {
                "stage": key.stage,
                "model": self.model,
                "inputs": dict(key.inputs),
                "bytes": sum(path.stat().st_size for path in files),
                "sha256": sums,
            }
            (temporary / MANIFEST).write_text(
                json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8"
            )
        shutil.rmtree(work, ignore_errors=True)
