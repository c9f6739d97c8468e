"""The command of one stage of a job, in a process of its own.

    python -m service.stage_process.command STAGE --job ID --artifacts URL ...

It reads the job's options from the artifact store and walks the pipeline up to its stage. Stages
before it are stored already, so they are only read. It puts the results into the artifact store.
Standard output has one JSON document a line, see `service.worker.stage_runner.StageRunner`.
"""

import argparse
import os
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from quantizer.known_error import KnownError
from service.errors import RequestError
from service.failpoint import failpoint
from service.logs import set_up_logging
from service.problems import problem_document, problem_of
from service.process import keep_freed_memory, live_and_die_with_parent, quiet_libraries
from service.request.stage_names import DELIVER, ESTIMATE, PIPELINE
from service.stage_process.job_request import Confinement, as_called, read_request
from service.stage_process.outcomes import outcome_of, store_results
from service.stage_process.progress_lines import ProgressLines, write_line
from service.storage.artifact_store import ArtifactStore
from service.storage.profile_store import ProfileStore
from service.storage.stage_store import StageStore
from service.storage.unfinished_runs import UnfinishedRun

NICE = 10
"""Added to the niceness of the process, so that the API keeps answering quickly."""


def main(given: Sequence[str] | None = None) -> None:
    """Run one stage and write its outcome, or the problem that ended it, to standard output.

    Args:
        given: the arguments; None for those of the command line.
    """
    live_and_die_with_parent()
    keep_freed_memory()
    os.nice(NICE)
    arguments = parse(given)
    sink = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to standard error
    set_up_logging()
    quiet_libraries()
    confinement = Confinement(tuple(arguments.models), arguments.hub, {})
    try:
        failpoint(f"{arguments.stage}-started")
        outcome = run_stage(arguments, sink, confinement)
        failpoint(f"{arguments.stage}-done")
        write_line(sink, {"outcome": outcome})
    except KnownError as error:
        write_line(sink, {"problem": as_called(problem_of(error), confinement.names)})
    except Exception as error:  # noqa: BLE001  a bug; the log has its traceback
        traceback.print_exc()
        detail = f"{type(error).__name__} in stage {arguments.stage}; the job's log says more"
        write_line(sink, {"problem": problem_document("bug", 500, detail)})


def parse(given: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments."""
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


def run_stage(
    arguments: argparse.Namespace, sink: TextIO, confinement: Confinement
) -> dict[str, Any]:
    """Run the stage that the arguments name, and return its outcome.

    Raises:
        RequestError: there is no such stage, or the job's options are not understood.
        KnownError: see `service.pipeline.walk`.
    """
    artifacts = ArtifactStore(arguments.artifacts)
    request = read_request(artifacts, arguments.job, confinement)
    from service import pipeline, single_stages  # noqa: PLC0415  torch; bad input is refused before

    is_run = arguments.stage != ESTIMATE
    run = UnfinishedRun(arguments.cache, arguments.job) if is_run else None
    store = StageStore(arguments.cache, run)
    given = ProfileStore(artifacts).get(arguments.profile) if arguments.profile else None
    names = confinement.names
    if arguments.stage == ESTIMATE:
        return dict(as_called(single_stages.estimate_run(request, store, given), names))
    last = PIPELINE[-1] if arguments.stage == DELIVER else arguments.stage
    reporter = ProgressLines(arguments.stage, sink)
    for state in pipeline.walk(request, store, reporter, given):
        if state.stage != last:
            continue
        if arguments.stage == DELIVER:
            results = store_results(artifacts, arguments.job, arguments.cache, state, names)
            store.end_run()
            return results
        return outcome_of(artifacts, state)
    raise RequestError(
        f"stage {arguments.stage!r} does not exist; use one of {', '.join(PIPELINE)}"
    )


if __name__ == "__main__":
    main()
