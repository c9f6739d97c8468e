"""What the commands that run a model do. Imports PyTorch, so it is imported late."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from quantizer.errors import MemoryShort
from quantizer.known_error import KnownError
from quantizer.texts.text import TextSpec
from service import pipeline, single_stages
from service.cli.console import out, print_json, print_pairs
from service.cli.files import read_plan
from service.cli.progress import reporting
from service.cli.reports import print_report
from service.errors import RequestError, StorageError
from service.report.deliver import check_output, deliver, deliver_files
from service.request.effort import find_effort
from service.request.options import EvaluateSettings, QuantizeSettings
from service.request.request import RunRequest
from service.stages.recipe import find_recipe
from service.stages.single_stage_requests import EvaluateRequest, QuantizeRequest
from service.storage.profile_store import ARRAYS, HEAD
from service.storage.stage_store import StageStore
from service.storage.unfinished_runs import UnfinishedRun


@contextmanager
def run_store(cache: Path, *run: object) -> Iterator[StageStore]:
    """Give the store of a run, whose stages stay in the cache until it ends.

    A run that was stopped, or found the disk full, goes on when the same command is run again.

    Args:
        cache: folder of the store.
        run: what the run is asked for; the same each time.
    """
    name = hashlib.sha256(repr(run).encode()).hexdigest()[:32]
    store = StageStore(cache, UnfinishedRun(cache, name))
    try:
        yield store
    except (StorageError, MemoryShort):
        raise
    except KnownError:
        store.end_run()  # the same command would fail again
        raise
    store.end_run()


def estimate(request: RunRequest, cache: Path, *, as_json: bool) -> None:
    """Print what a run would take."""
    print_pairs(single_stages.estimate_run(request, StageStore(cache)), as_json=as_json)


def run(request: RunRequest, out_folder: Path, cache: Path, *, as_json: bool) -> None:
    """Do the whole job, deliver the checkpoint and print its report."""
    check_output(out_folder)
    with run_store(cache, request) as store:
        with reporting() as reporter:
            report, delivery = pipeline.run(request, store, reporter)
        deliver(out_folder, delivery.checkpoint, delivery.source, report)
    if as_json:
        print_json(report.to_json())
        return
    print_report(report)
    out.print(f"checkpoint: {out_folder.resolve()}", markup=False)
    out.print(f"report: {out_folder.resolve() / 'report.html'}", markup=False)


def profile(request: RunRequest, out_folder: Path, cache: Path, *, as_json: bool) -> None:
    """Measure a profile, deliver it and print a summary."""
    check_output(out_folder)
    with run_store(cache, "profile", request) as store:
        with reporting() as reporter:
            measured = single_stages.profile_model(request, store, reporter)
        head, arrays = measured.dumps()
        deliver_files(out_folder, {HEAD: head, ARRAYS: arrays})
    low, high = measured.budget_range
    context = measured.context
    summary = {
        "profile": str(out_folder.resolve()),
        "layers": len(measured.layers),
        "fidelities": [fidelity.name for fidelity in measured.fidelities],
        "signal": measured.signal,
        "context": "original" if context is None else measured.fidelities[context].name,
        "context_kl_nats_per_token": measured.context_loss,
        "coupling_rank": measured.factor.shape[0],
        "budget_range_bytes": [low, high],
        "unquantized_bytes": measured.unquantized.total_bytes if measured.unquantized else None,
    }
    print_pairs(summary, as_json=as_json)


def quantize(
    model: str,
    plan_file: Path,
    options: QuantizeSettings,
    out_folder: Path,
    cache: Path,
    *,
    as_json: bool,
) -> None:
    """Quantize a model by a plan, deliver the checkpoint and print a summary."""
    check_output(out_folder)
    windows, tokens = options.calibration_windows, options.tokens
    request = QuantizeRequest(
        model=model,
        plan=read_plan(plan_file),
        text=TextSpec(options.calibration, windows, tokens, options.seed),
        held_out_windows=options.guard_windows,
        effort=find_effort(options.effort),
        recipe=find_recipe(options.recipe),
        seed=options.seed,
        device=options.device,
    )
    with run_store(cache, request) as store:
        with reporting() as reporter:
            quantized = single_stages.quantize_model(request, store, reporter)
        deliver(out_folder, quantized.checkpoint, quantized.source, None)
    summary = {
        "checkpoint": str(out_folder.resolve()),
        "trained": quantized.trained,
        "plan_bytes": quantized.plan.weight_bytes,
        "bits_per_weight": quantized.plan.bits_per_weight,
    }
    print_pairs(summary, as_json=as_json)


def evaluate(
    model: str,
    checkpoints: Sequence[Path],
    options: EvaluateSettings,
    cache: Path,
    *,
    as_json: bool,
) -> None:
    """Measure checkpoints of a model, and print their figures by folder.

    Raises:
        RequestError: a folder is not a checkpoint.
    """
    for path in checkpoints:
        if not (path / "plan.json").is_file():
            raise RequestError(
                f"checkpoint {str(path)!r} is no folder that bitwright wrote: it has no plan.json"
            )
    windows, tokens = options.evaluation_windows, options.tokens
    request = EvaluateRequest(
        model=model,
        checkpoints={str(path): path for path in checkpoints},
        text=TextSpec(options.evaluation, windows, tokens, None),
        device=options.device,
    )
    with run_store(cache, request) as store, reporting() as reporter:
        scores = single_stages.evaluate_checkpoints(request, store, reporter)
    print_pairs({name: score.to_json() for name, score in scores.items()}, as_json=as_json)
