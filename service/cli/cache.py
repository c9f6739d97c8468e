"""The command `cache`: what is kept of finished stages, and what of it may go."""

import re
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.table import Table

from allocator.demands.budget import Budget
from allocator.errors import BudgetError
from service.cli.console import out, print_json
from service.cli.parameters import AsJson, Cache
from service.errors import RequestError
from service.settings import default_cache
from service.storage.cache_entry import CacheEntry, read_entries
from service.storage.cache_limit import default_limit, read_limit, write_limit
from service.storage.cache_removal import Removal, is_free, remove

CACHE = default_cache()

_AGE = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?)(?P<unit>[mhdw])")
_SECONDS = {"m": 60, "h": 3600, "d": 86400, "w": 604800}
_UNKNOWN = "(not recorded)"


def cache(
    *,
    older_than: Annotated[
        str | None,
        Parameter(
            help="Remove what was not used for this long: 90m, 12h, 30d or 4w; 0m for all.",
            allow_leading_hyphen=True,
        ),
    ] = None,
    keep: Annotated[
        str | None,
        Parameter(
            help="Remove the least recently used until no more than this is left: 20GB.",
            allow_leading_hyphen=True,
        ),
    ] = None,
    limit: Annotated[
        str | None,
        Parameter(
            help="Record how large the cache may become: 50GB. When a stage makes it larger, the "
            "least recently used stages are removed. Default: half of what the disk had free at "
            "first use.",
            allow_leading_hyphen=True,
        ),
    ] = None,
    dry_run: Annotated[
        bool, Parameter(help="Say what would be removed, and remove nothing.")
    ] = False,
    cache_folder: Cache = CACHE,
    as_json: AsJson = False,
) -> None:
    """List what is kept of finished stages, by model and age, and remove what is not needed.

    What a process works on, and what a run that has not ended uses, is never removed.

    Raises:
        RequestError: an age or a size cannot be understood.
    """
    wanted = None if limit is None else size_of(limit)
    done = _remove(cache_folder, older_than, keep, dry_run=dry_run)
    if wanted is not None and not dry_run:
        cache_folder.mkdir(parents=True, exist_ok=True)
        write_limit(cache_folder, wanted)
    entries = read_entries(cache_folder) if cache_folder.is_dir() else []
    document = summary(cache_folder, entries, done, dry_run=dry_run)
    if as_json:
        print_json(document)
        return
    _print(document)


def _remove(root: Path, older_than: str | None, keep: str | None, *, dry_run: bool) -> Removal:
    """Remove what is too old, then what is too much."""
    before = None if older_than is None else time.time() - seconds_of(older_than)
    most_bytes = None if keep is None else size_of(keep)
    done = Removal()
    if not root.is_dir():
        return done
    entries = read_entries(root)
    if before is not None:
        old = [entry for entry in entries if entry.used_at < before]
        done = remove(root, old, dry_run=dry_run)
    if most_bytes is not None:
        gone = {entry.place for entry in done.removed}
        rest = [entry for entry in entries if entry.place not in gone]
        taken = done.removed_bytes if dry_run else 0
        more = remove(root, rest, most_bytes + taken, dry_run=dry_run)
        done = Removal([*done.removed, *more.removed], [*done.in_use, *more.in_use])
    return done


def summary(
    root: Path, entries: Sequence[CacheEntry], done: Removal, *, dry_run: bool
) -> dict[str, Any]:
    """Return what is in the cache and what was removed, as JSON values."""
    limit = read_limit(root)
    return {
        "cache": str(root),
        "size_bytes": sum(entry.size_bytes for entry in entries),
        "limit_bytes": default_limit(root) if limit is None else limit,
        "entries": [row(root, entry) for entry in sorted(entries, key=_by_model)],
        "dry_run": dry_run,
        "removed": [entry.place for entry in done.removed],
        "removed_bytes": done.removed_bytes,
        "in_use": [entry.place for entry in done.in_use],
    }


def row(root: Path, entry: CacheEntry) -> dict[str, Any]:
    """Return one entry as JSON values."""
    used = datetime.fromtimestamp(entry.used_at, UTC)
    return {
        "model": entry.model or None,
        "stage": entry.stage,
        "place": entry.place,
        "size_bytes": entry.size_bytes,
        "used_at": used.isoformat(timespec="seconds"),
        "finished": entry.finished,
        "in_use": entry.in_run or not is_free(root, entry),
    }


def _by_model(entry: CacheEntry) -> tuple[str, float]:
    return entry.model, entry.used_at


def _print(document: dict[str, Any]) -> None:
    table = Table("model", "stage", "key", "size", "last used", "state")
    for entry in document["entries"]:
        state = [] if entry["finished"] else ["unfinished"]
        state += ["in use"] if entry["in_use"] else []
        key = entry["place"].partition("/")[2][:12]
        cells = [entry["model"] or _UNKNOWN, entry["stage"], key, readable(entry["size_bytes"])]
        table.add_row(*cells, entry["used_at"], ", ".join(state))
    out.print(table)
    out.print(
        f"{document['cache']}: {readable(document['size_bytes'])} of at most "
        f"{readable(document['limit_bytes'])}",
        markup=False,
    )
    if document["removed"] or document["in_use"]:
        verb = "would be removed" if document["dry_run"] else "removed"
        out.print(
            f"{verb}: {len(document['removed'])} entries, {readable(document['removed_bytes'])}; "
            f"in use, so kept: {len(document['in_use'])}",
            markup=False,
        )


def seconds_of(text: str) -> float:
    """Return the seconds of an age such as 30d.

    Raises:
        RequestError: it has another form.
    """
    match = _AGE.fullmatch(text.strip())
    if match is None:
        raise RequestError(f"age {text[:40]!r}: give a number with m, h, d or w, such as 30d")
    return float(match["number"]) * _SECONDS[match["unit"]]


def size_of(text: str) -> int:
    """Return the bytes of a size such as 20GB.

    Raises:
        RequestError: it has another form.
    """
    wrong = f"size {text[:40]!r}: give bytes above 0 with their unit, such as 20GB or 1.5GiB"
    try:
        size = Budget.parse(text)
    except BudgetError as error:
        raise RequestError(wrong) from error
    if size.per_weight:
        raise RequestError(wrong)
    return size.weight_bytes(())


def readable(size_bytes: int) -> str:
    """Return a size for people, with three digits."""
    size = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:  # noqa: PLR2004
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
