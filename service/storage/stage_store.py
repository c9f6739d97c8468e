"""Finished stages on disk, each under the hash of exactly its own inputs.

    <root>/<stage>/<key>/            what the stage made, and manifest.json with a checksum of every file
    <root>/<stage>/<key>.work/       finished parts of a stage that was interrupted
    <root>/<stage>/<key>.lock        held while a process works on the stage

A stage folder is made under another name, flushed, and renamed, so one that exists is whole. Its
checksums are compared whenever it is used; if one differs, the stage is made anew.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from quantizer.durable import PartStore, atomic_folder, file_sha256
from service.storage.disk import disk_errors

log = logging.getLogger("bitwright")

MANIFEST = "manifest.json"


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


class StageStore:
    """All finished stages under one root folder."""

    def __init__(self, root: Path) -> None:
        """Use `root`, made if it is missing.

        Raises:
            StorageError: it cannot be made.
        """
        with disk_errors(root):
            root.mkdir(parents=True, exist_ok=True)
        self.root = root

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
            with FileLock(f"{folder}.lock"):
                if not self._is_whole(folder):
                    self._make(folder, key, make)
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
        work = folder.with_name(folder.name + ".work")
        if folder.exists():
            shutil.rmtree(folder)
        with atomic_folder(folder) as temporary:
            make(temporary, PartStore(work))
            files = sorted(path for path in temporary.rglob("*") if path.is_file())
            sums = {str(path.relative_to(temporary)): file_sha256(path) for path in files}
            manifest = {"stage": key.stage, "inputs": dict(key.inputs), "sha256": sums}
            (temporary / MANIFEST).write_text(
                json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8"
            )
        shutil.rmtree(work, ignore_errors=True)
