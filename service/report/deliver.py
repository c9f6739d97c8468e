"""Put results into the output folder: all of them, or none."""

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from quantizer.durable import atomic_folder, file_sha256
from quantizer.models.side_files import copy_side_files
from service.errors import OutputError
from service.report.document import Report
from service.report.layers import LayerInfo
from service.report.page import render_page
from service.storage.disk import copy_file, disk_errors

REPORT_JSON, REPORT_PAGE, LAYER_TABLE = "report.json", "report.html", "layers.csv"


def check_output(folder: Path) -> None:
    """Refuse an output folder that could not be made, before any work is done.

    Raises:
        OutputError: it is a file, not empty, the current folder, or cannot be made where it is.
        StorageError: the disk is full, or may not be written.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"output {str(folder)!r} is a file; name a new folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise OutputError(
            f"output folder {str(folder)!r} is not empty; name a new one, or empty it"
        )
    if folder.resolve() == Path.cwd():
        raise OutputError(f"output folder {str(folder)!r} is the current one; name a new one in it")
    above = next(parent for parent in folder.resolve().parents if parent.exists())
    try:
        with disk_errors(folder), TemporaryDirectory(prefix=".", dir=above):
            pass
    except OSError as error:
        raise OutputError(
            f"output folder {str(folder)!r} cannot be made: {str(above)!r}: {error.strerror}; name "
            "another place"
        ) from error


def layer_table(report: Report) -> str:
    """Return a report's layers as CSV, one row a layer.

    Columns are fidelity, bytes, and the change of the loss at each fidelity [nats/token].
    """
    rows = [_layer_row(report, name, layer) for name, layer in report.plan.layers.items()]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _layer_row(report: Report, name: str, layer: LayerInfo) -> dict[str, Any]:
    out_features, in_features = layer.shape
    damage = report.damage_nats_per_token[name]
    return {
        "layer": name,
        "block": layer.block,
        "kind": layer.kind,
        "out_features": out_features,
        "in_features": in_features,
        "fidelity": layer.fidelity,
        "weight_bytes": layer.weight_bytes,
        "uniform_fidelity": report.uniform[name],
        **{f"damage_{fidelity}": loss for fidelity, loss in damage.items()},
    }


def deliver(folder: Path, checkpoint: Path, source: Path, report: Report | None) -> None:
    """Make the output folder: the checkpoint, the original's side files, and the report.

    Side files are those of the model folder now, see `quantizer.models.side_files`.

    The folder appears complete or not at all. Its files are copies with the permissions of new
    files, so an edit of them changes nothing in the cache.

    Args:
        folder: new or empty.
        checkpoint: folder whose files are delivered.
        source: folder of the original model.
        report: None for a folder without report.

    Raises:
        OutputError: see `check_output`; or a side file is another than the report says.
        StorageError: the disk is full.
    """
    check_output(folder)
    with disk_errors(folder), atomic_folder(folder.resolve()) as temporary:
        side_files = copy_side_files(source, temporary)
        for file in sorted(checkpoint.iterdir()):
            if file.name not in side_files:
                copy_file(file, temporary / file.name)
        if report is not None:
            digests = {name: file_sha256(temporary / name) for name in side_files}
            _check_side_files(source, digests, report)
            (temporary / REPORT_JSON).write_text(
                json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8"
            )
            (temporary / REPORT_PAGE).write_text(render_page(report), encoding="utf-8")
            (temporary / LAYER_TABLE).write_text(layer_table(report), encoding="utf-8")


def _check_side_files(source: Path, now: Mapping[str, str], report: Report) -> None:
    """Refuse side files that were edited since the report was made."""
    if report.side_files is None:
        return
    for name in sorted(now.keys() | report.side_files.keys()):
        if now.get(name) != report.side_files.get(name):
            raise OutputError(
                f"file {str(source / name)!r} was edited while the run ended; run the same "
                "command again"
            )


def deliver_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Make the output folder with these files; it appears complete or not at all.

    Raises:
        OutputError, StorageError: see `check_output`.
    """
    check_output(folder)
    with disk_errors(folder), atomic_folder(folder.resolve()) as temporary:
        for name, content in files.items():
            (temporary / name).write_bytes(content)
