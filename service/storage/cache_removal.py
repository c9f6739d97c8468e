"""Remove stages from the cache, but none that is locked or that an unfinished run uses."""

import shutil
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from service.storage.cache_entry import MODELS, WORK_SUFFIX, CacheEntry, read_entries, read_entry
from service.storage.unfinished_runs import used_places

LOCK_SUFFIX = ".lock"


@dataclass(slots=True)
class Removal:
    """What was removed, and what had to stay.

    Attributes:
        removed: entries that are gone.
        in_use: entries that were to go, but are in use.
    """

    removed: list[CacheEntry] = field(default_factory=list)
    in_use: list[CacheEntry] = field(default_factory=list)

    @property
    def removed_bytes(self) -> int:
        """Size of all that is gone."""
        return sum(entry.size_bytes for entry in self.removed)


def remove(
    root: Path,
    entries: Iterable[CacheEntry],
    most_bytes: int | None = None,
    *,
    protected: Collection[str] = (),
    dry_run: bool = False,
) -> Removal:
    """Remove entries, in their order, and return what became of them.

    Args:
        root: folder of the cache.
        entries: what may go.
        most_bytes: size of the cache at which removal stops; None removes all entries.
        protected: places of entries that stay.
        dry_run: only say what would be removed.
    """
    done = Removal()
    total = sum(entry.size_bytes for entry in read_entries(root))
    for entry in entries:
        if most_bytes is not None and total <= most_bytes:
            break
        stays = entry.in_run or entry.place in protected
        if stays or not (is_free(root, entry) if dry_run else _remove(root, entry)):
            done.in_use.append(entry)
            continue
        done.removed.append(entry)
        total -= entry.size_bytes
    return done


def is_free(root: Path, entry: CacheEntry) -> bool:
    """Return whether no process works on an entry now."""
    lock = FileLock(f"{root / entry.place}{LOCK_SUFFIX}", timeout=0)
    if not Path(lock.lock_file).exists():
        return True
    try:
        with lock:
            return True
    except Timeout:
        return False


def _remove(root: Path, entry: CacheEntry) -> bool:
    """Remove an entry, unless it is in use by now; return whether it is gone."""
    folder = root / entry.place
    try:
        with FileLock(f"{folder}{LOCK_SUFFIX}", timeout=0):
            used = used_places(root)
            now = read_entry(root, entry.place, used)
            is_used = entry.place in used or (entry.stage == MODELS and bool(used))
            if is_used or (now is not None and now.used_at > entry.used_at):
                return False
            for path in (folder, folder.with_name(folder.name + WORK_SUFFIX)):
                _remove_folder(path)
    except Timeout:
        return False
    return True


def _remove_folder(folder: Path) -> None:
    """Remove a folder that may be missing, so that a part of it is never found under its name."""
    trash = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(trash, ignore_errors=True)
    with suppress(FileNotFoundError):
        folder.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)
