"""Put results where the user wants them: all at once, never half."""

import json
import shutil
from pathlib import Path

import pandas as pd

from quantizer.durable import sync_folder
from service.errors import OutputError
from service.report.document import Report
from service.report.page import render_page
from service.storage.disk import disk_errors, link_or_copy

REPORT_JSON, REPORT_PAGE, LAYER_TABLE = "report.json", "report.html", "layers.csv"


def check_output(folder: Path) -> None:
    """Refuse an output folder that holds something, before any work is done.

    Raises:
        OutputError: it is a file, or not empty.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"output {str(folder)!r} is a file; name a new folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise OutputError(
            f"output folder {str(folder)!r} is not empty; name a new one, or empty it"
        )


def layer_table(report: Report) -> str:
    """Return a report's layers as CSV.

    One row a layer, with fidelity, bytes, and the damage of each change from the context.
    """
    rows = [
        {
            "layer": name,
            "block": row["block"],
            "kind": row["kind"],
            "out_features": row["shape"][0],
            "in_features": row["shape"][1],
            "fidelity": row["fidelity"],
            "weight_bytes": row["weight_bytes"],
            "uniform_fidelity": report["uniform"][name],
            **{
                f"damage_{fidelity}": value
                for fidelity, value in report["damage_nats_per_token"][name].items()
            },
        }
        for name, row in report["plan"]["layers"].items()
    ]
    return str(pd.DataFrame(rows).to_csv(index=False))


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
                (temporary / REPORT_JSON).write_text(
                    json.dumps(report, indent=1) + "\n", encoding="utf-8"
                )
                (temporary / REPORT_PAGE).write_text(render_page(report), encoding="utf-8")
                (temporary / LAYER_TABLE).write_text(layer_table(report), encoding="utf-8")
            if folder.is_dir():
                folder.rmdir()
            temporary.rename(folder)
            sync_folder(folder.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
