"""Files that a user names on the command line.

Read with a clear error, written whole or not at all, never over another.
"""

import io
from pathlib import Path

from allocator.demands.constraints import LatencyTable
from quantizer.durable import write_atomically
from service.errors import OutputError, RequestError
from service.storage.disk import disk_errors


def read_text_file(path: Path, what: str) -> str:
    """Return the text of a file; `what` names it in the error.

    Raises:
        RequestError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{what} {str(path)!r} cannot be read: {error}") from error


def read_latency(path: Path | None) -> LatencyTable | None:
    """Return the table of latencies in a CSV file; None where no file is named.

    Raises:
        RequestError: the file cannot be read.
        RuleError: a line of it cannot be understood.
    """
    if path is None:
        return None
    return LatencyTable.read(io.StringIO(read_text_file(path, "latency table")))


def check_new(*paths: Path | None) -> None:
    """Refuse files that could not be written, before anything is worked out for them.

    Raises:
        OutputError: one is there, is named twice, or its folder is not there.
    """
    named = [path for path in paths if path is not None]
    for path in named:
        if path.exists():
            raise OutputError(f"file {str(path)!r} exists; name a new one")
        if not path.resolve().parent.is_dir():
            raise OutputError(f"folder {str(path.parent)!r} does not exist; make it first")
        if named.count(path) > 1:
            raise OutputError(f"file {str(path)!r} is named twice")


def write_new(path: Path, data: bytes) -> None:
    """Write a file that is not there yet.

    Raises:
        OutputError: see `check_new`.
        StorageError: it cannot be written.
    """
    check_new(path)
    with disk_errors(path):
        write_atomically(path, data)
