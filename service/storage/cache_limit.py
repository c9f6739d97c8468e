"""How large the cache may become.

The limit is recorded in the cache's folder at first use: half of what the disk has free then.
"""

import json
import logging
import shutil
from collections.abc import Collection
from pathlib import Path

from quantizer.durable import write_atomically
from service.storage.cache_entry import read_entries
from service.storage.cache_removal import remove

log = logging.getLogger("bitwright")

LIMIT = "limit.json"
"""File below the root of the cache that holds the limit."""

_SHARE = 2
"""The default limit is the free space of the disk, divided by this."""


def default_limit(root: Path) -> int:
    """Return the limit that a cache below `root` gets if its first use is now, in bytes."""
    nearest = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
    return shutil.disk_usage(nearest).free // _SHARE


def read_limit(root: Path) -> int | None:
    """Return the limit that is recorded [bytes], None before the first use of the cache."""
    try:
        limit = json.loads((root / LIMIT).read_text(encoding="utf-8"))["limit_bytes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return limit if isinstance(limit, int) else None


def write_limit(root: Path, limit_bytes: int) -> None:
    """Record the limit."""
    write_atomically(root / LIMIT, (json.dumps({"limit_bytes": limit_bytes}) + "\n").encode())


def limit_of(root: Path) -> int:
    """Return the limit [bytes], and record the default if none is recorded."""
    limit = read_limit(root)
    if limit is None:
        limit = default_limit(root)
        write_limit(root, limit)
    return limit


def keep_limit(root: Path, protected: Collection[str]) -> None:
    """Remove the least recently used stages until the cache is within its limit.

    Args:
        root: folder of the cache.
        protected: places of stages that stay, beside those in use.
    """
    limit = limit_of(root)
    entries = read_entries(root)
    if sum(entry.size_bytes for entry in entries) <= limit:
        return
    done = remove(root, entries, limit, protected=protected)
    log.info(
        "the cache was larger than its limit of %d bytes: %d entries of %d bytes were removed",
        limit,
        len(done.removed),
        done.removed_bytes,
    )
