"""Which finished stages the runs use that have not ended.

    <root>/runs/<run>.stages       one stage a line: `<stage>/<key>`, and the name of its model

A run notes each stage when it asks for it. Its file is removed when the run ends; that of a run
that was killed stays, so that the run finds its stages when it is started again. A run that has
asked for no stage for `ABANDONED_DAYS` counts as abandoned.
"""

import time
from pathlib import Path

FOLDER = "runs"
ABANDONED_DAYS = 30

_SUFFIX = ".stages"
_DAY_SECONDS = 86400


class UnfinishedRun:
    """One run, from its first stage until it ends."""

    def __init__(self, root: Path, name: str) -> None:
        """Keep the record of the run called `name` below `root`; nothing is written yet."""
        self._root = root
        self._file = root / FOLDER / f"{name}{_SUFFIX}"
        self._noted: set[str] = set()

    def note(self, folder: Path, model: str) -> None:
        """Record that the run uses a stage, or a converted model, of the model called `model`."""
        place = place_of(self._root, folder)
        if place not in self._noted:
            self._file.parent.mkdir(exist_ok=True)
            with self._file.open("a", encoding="utf-8") as file:
                file.write(f"{place}\t{model}\n")
            self._noted.add(place)

    def end(self) -> None:
        """Record that the run has ended."""
        self._file.unlink(missing_ok=True)


def place_of(root: Path, folder: Path) -> str:
    """Return what a stage is called in a record: its folder below the root."""
    return folder.relative_to(root).as_posix()


def used_places(root: Path) -> dict[str, str]:
    """Return the stages that unfinished runs use, with the names of their models.

    Abandoned runs do not count.
    """
    oldest = time.time() - ABANDONED_DAYS * _DAY_SECONDS
    found: dict[str, str] = {}
    for file in (root / FOLDER).glob(f"*{_SUFFIX}"):
        try:
            if file.stat().st_mtime >= oldest:
                lines = file.read_text(encoding="utf-8").splitlines()
                found.update(line.partition("\t")[::2] for line in lines)
        except FileNotFoundError:  # the run has just ended
            continue
    return found
