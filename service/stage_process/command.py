"""The command of one stage of a job, in a process of its own: `python -m service.stage_process.command STAGE --job ID --artifacts URL ...`.

It reads the job's options from the artifact store, walks the pipeline up to its stage (the stages
before are kept, so they are only read), and puts what it made into the store. Standard output: one
JSON document a line, see `service.worker.runner.StageRunner`.
"""

import argparse
import json
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from pydantic import ValidationError

from quantizer.known_error import KnownError
from service.errors import RequestError
from service.failpoint import failpoint
from service.logs import set_up_logging
from service.problems import problem_document, problem_of
from service.process import keep_freed_memory, live_and_die_with_parent, quiet_libraries
from service.request.confine import confine_model, confine_text
from service.request.options import JobOptions
from service.request.stage_names import (
    DELIVER,
    ESTIMATE,
    PIPELINE,
    REQUEST,
    request_place,
    result_place,
)
from service.storage.artifact_store import ArtifactStore
from service.storage.profile_store import ProfileStore

if TYPE_CHECKING:
    from quantizer.durable import Progress
    from service.pipeline import Made
    from service.request.request import RunRequest

PROGRESS_SECONDS, STILL_SECONDS = 2.0, 15.0
"""Shortest time between two lines of progress of one step, and how long less than a hundredth of it is not told."""

NICE = 10
"""A stage leaves the processor to the API, whose answers somebody waits for."""


class Told:
    """A reporter that writes lines of JSON, now and then, with the time left."""

    def __init__(self, stage: str, sink: TextIO) -> None:
        """Tell of `stage` on `sink`."""
        self._stage, self._sink = stage, sink

    def step(self, label: str) -> "Progress":
        """Announce a step."""
        start, last, told = time.monotonic(), 0.0, 0

        def update(done: int, total: int) -> None:
            nonlocal last, told
            now = time.monotonic()
            pause = PROGRESS_SECONDS if done - told >= total / 100 else STILL_SECONDS
            if done < total and now - last < pause:
                return
            last, told = now, done
            left = (now - start) * (total - done) / max(done, 1)
            progress = {
                "stage": self._stage,
                "step": label,
                "done": done,
                "total": total,
                "seconds_left": round(left, 1),
            }
            write(self._sink, {"progress": progress})

        return update


def write(sink: TextIO, document: Mapping[str, Any]) -> None:
    """Write one document as a line."""
    sink.write(json.dumps(finite(document)) + "\n")
    sink.flush()


def finite(document: Any) -> Any:
    """Return a document with None for numbers that JSON cannot say, such as the perplexity of a model that is nothing but noise."""
    if isinstance(document, Mapping):
        return {key: finite(value) for key, value in document.items()}
    if isinstance(document, list | tuple):
        return [finite(value) for value in document]
    return None if isinstance(document, float) and not isfinite(document) else document


def main(given: Sequence[str] | None = None) -> None:
    """Run the stage that the command line asks for, or `given` if not None, and say what it found, or why not."""
    live_and_die_with_parent()
    keep_freed_memory()
    os.nice(NICE)
    arguments = parse(given)
    sink = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints is for people
    set_up_logging()
    quiet_libraries()
    names: dict[str, str] = {}
    try:
        failpoint(f"{arguments.stage}-started")
        outcome = do(arguments, sink, names)
        failpoint(f"{arguments.stage}-done")
        write(sink, {"outcome": outcome})
    except KnownError as error:
        write(sink, {"problem": as_called(problem_of(error), names)})
    except Exception as error:  # noqa: BLE001  a bug is told in the log, and as a problem
        traceback.print_exc()
        detail = f"{type(error).__name__} in stage {arguments.stage}; the job's log says more"
        write(sink, {"problem": problem_document("bug", 500, detail)})


def parse(given: Sequence[str] | None) -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m service.stage_process.command", description="Run one stage of a job."
    )
    parser.add_argument("stage")
    parser.add_argument("--job", required=True, help="id of the job")
    parser.add_argument("--artifacts", required=True, help="store of options and results")
    parser.add_argument("--cache", required=True, type=Path, help="folder of finished stages")
    parser.add_argument("--profile", help="digest of the profile to use instead of measuring one")
    parser.add_argument(
        "--models",
        action="append",
        default=[],
        type=Path,
        help="folder whose models and texts may be used",
    )
    parser.add_argument(
        "--hub", action="store_true", help="whether models and texts of the hub may be used"
    )
    return parser.parse_args(given)


def do(arguments: argparse.Namespace, sink: TextIO, names: dict[str, str]) -> dict[str, Any]:
    """Do what the command line says; return the outcome.

    `names` comes to hold what the job calls each path.
    """
    artifacts = ArtifactStore(arguments.artifacts)
    request = read_request(artifacts, arguments, names)
    from service import pipeline  # noqa: PLC0415  torch takes seconds to import; bad input is told before
    from service.stages import prepare as prepare_stage  # noqa: PLC0415  torch takes seconds to import; bad input is told before
    from service.storage.stage_store import StageStore  # noqa: PLC0415

    store = StageStore(arguments.cache)
    given = ProfileStore(artifacts).get(arguments.profile) if arguments.profile else None
    if arguments.stage == ESTIMATE:
        from service.stages.estimate import dry_run  # noqa: PLC0415

        return dict(
            as_called(
                dry_run(request, prepare_stage.prepare(request, store, given, read_weights=False)),
                names,
            )
        )
    last = PIPELINE[-1] if arguments.stage == DELIVER else arguments.stage
    for made in pipeline.walk(request, store, Told(arguments.stage, sink), given):
        if made.stage == last and arguments.stage == DELIVER:
            return deliver(artifacts, arguments, made, as_called(made.report, names))
        if made.stage == last:
            return tell(artifacts, made)
    raise RequestError(
        f"stage {arguments.stage!r} does not exist; use one of {', '.join(PIPELINE)}"
    )


def read_request(
    artifacts: ArtifactStore, arguments: argparse.Namespace, names: dict[str, str]
) -> "RunRequest":
    """Return the job's options, with its names confined to what this machine opens.

    Note what each path is called.

    Raises:
        RequestError: they are not what was stored at submission.
        PathRefused: a name leads elsewhere.
    """
    try:
        options = JobOptions.model_validate_json(
            artifacts.read(request_place(arguments.job), REQUEST)
        )
    except ValidationError as error:
        raise RequestError(
            f"the options of job {arguments.job} are not understood by this version: {error}"
        ) from error

    def confined(confine: Callable[..., str], named: str) -> str:
        path = confine(named, arguments.models, hub=arguments.hub)
        names[path] = named
        return path

    return options.request(
        lambda named: confined(confine_model, named), lambda named: confined(confine_text, named)
    )


def as_called(document: Any, names: Mapping[str, str]) -> Any:
    """Return a document with paths of this machine replaced by what the job calls them.

    They are nobody else's business.
    """
    if isinstance(document, str):
        for path, named in names.items():
            document = document.replace(path, named)
        return document
    if isinstance(document, Mapping):
        return {key: as_called(value, names) for key, value in document.items()}
    return (
        [as_called(value, names) for value in document]
        if isinstance(document, list | tuple)
        else document
    )


def tell(artifacts: ArtifactStore, made: "Made") -> dict[str, Any]:
    """Return what a stage found, in few words; a profile is put where it can be asked what-ifs."""
    if made.stage == "profile":
        head, arrays = made.profile.dumps()
        digest, _ = ProfileStore(artifacts).add(head, arrays)
        return {
            "profile": digest,
            "signal": made.profile.signal,
            "layers": len(made.profile.layers),
        }
    if made.stage == "plan":
        chosen = made.allocations["plan"]
        return {
            "budget_bytes": chosen.budget_bytes,
            "plan_bytes": chosen.plan.weight_bytes,
            "bits_per_weight": chosen.plan.bits_per_weight,
            "predicted_kl_nats_per_token": chosen.predicted_loss,
            "gap": chosen.gap,
        }
    if made.stage == "quantize":
        return {"candidates": sorted(made.candidates)}
    if made.stage == "tune":
        return {"trained": made.trained}
    return {"delivered": (made.report or {})["guard"]["delivered"]}


def deliver(
    artifacts: ArtifactStore, arguments: argparse.Namespace, made: "Made", report: dict[str, Any]
) -> dict[str, Any]:
    """Put the checkpoint and its report into the store.

    Return the figures that people look at first.
    """
    from service.report.deliver import deliver as put_together  # noqa: PLC0415

    with tempfile.TemporaryDirectory(dir=arguments.cache, prefix="deliver-") as folder:
        out = Path(folder) / "out"
        put_together(out, made.checkpoint or out, report)
        files = {
            str(path.relative_to(out)): path for path in sorted(out.rglob("*")) if path.is_file()
        }
        kept = artifacts.put(result_place(arguments.job), files)
    figures = (
        "budget_bytes",
        "plan_bytes",
        "bits_per_weight",
        "checkpoint_bytes",
        "original_bytes",
        "uniform_bytes",
        "notes",
    )
    return {
        "result": {name: report[name] for name in figures} | {"evaluation": report["evaluation"]},
        "delivered": report["guard"]["delivered"],
        "stored_bytes": sum(artifact.size_bytes for artifact in kept),
    }


if __name__ == "__main__":
    main()
