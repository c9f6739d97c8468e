"""Put results where the user wants them: all at once, never half."""

import json
import shutil
from pathlib import Path

from quantizer.durable import sync_folder
from service.errors import OutputError
from service.page import render_page
from service.report import Report
from service.store import disk_errors, link_or_copy

REPORT_JSON, REPORT_PAGE = "report.json", "report.html"


def check_output(folder: Path) -> None:
    """Refuse an output folder that holds something, before any work is done.

    Raises:
        OutputError: it is a file, or not empty.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"output {str(folder)!r} is a file; name a new folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise OutputError(f"output folder {str(folder)!r} is not empty; name a new one, or empty it")


def deliver(folder: Path, checkpoint: Path, report: Report | None) -> None:
    """Make the output folder: the checkpoint's files, and the report beside them.

    The folder appears whole or not at all.

    Raises:
        OutputError: the folder has come to hold something meanwhile.
        StorageError: the disk is full.
    """
    check_output(folder)
    temporary = folder.with_name(f".{folder.name}.new")
    with disk_errors(folder):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            for file in sorted(checkpoint.iterdir()):
                link_or_copy(file, temporary / file.name)
            if report is not None:
                (temporary / REPORT_JSON).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
                (temporary / REPORT_PAGE).write_text(render_page(report), encoding="utf-8")
            if folder.is_dir():
                folder.rmdir()
            temporary.rename(folder)
            sync_folder(folder.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
