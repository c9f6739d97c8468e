"""Files that a user names on the command line.

Read with a clear error, written whole or not at all, never over another.
"""

import io
from pathlib import Path

from allocator.demands.constraints import LatencyTable
from quantizer.durable import write_atomically
from quantizer.errors import PlanError
from quantizer.plans.plan import Plan
from service.errors import OutputError, RequestError
from service.storage.disk import disk_errors


def read_text_file(path: Path, what: str) -> str:
    """Return the text of a file; `what` names it in the error.

    Raises:
        RequestError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{what} {str(path)!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{what} {str(path)!r} cannot be read: it is no UTF-8 text") from error


def read_plan(path: Path) -> Plan:
    """Return the plan in a file.

    Raises:
        RequestError: the file cannot be read.
        PlanError: it holds no plan.
    """
    text = read_text_file(path, "plan")
    try:
        return Plan.loads(text)
    except PlanError as error:
        raise PlanError(f"file {str(path)!r}: {error}") from error


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
            what = "folder" if path.is_dir() else "file"
            raise OutputError(f"{what} {str(path)!r} exists; name a new file")
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
