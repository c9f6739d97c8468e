"""Single stages, as the commands `profile`, `quantize`, `evaluate` and `run --dry-run` use them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from allocator.profile import Profile
from quantizer.models.loading import meta_model
from quantizer.plans.plan import Plan
from quantizer.running.quality import Quality
from quantizer.structure.blocks import find_layers
from quantizer.structure.coverage import measure_coverage
from service.request.request import BATCH, RunRequest
from service.stages.calibration_windows import quantizing_windows, text_windows
from service.stages.checkpoint import check_plan
from service.stages.clock import Clock
from service.stages.context import RunContext, model_in, store_for
from service.stages.embeddings import measure_unquantized
from service.stages.estimate import dry_run
from service.stages.evaluation import evaluate
from service.stages.machine import Machine
from service.stages.model_sizes import measure_sizes
from service.stages.prepare import prepare
from service.stages.prepared_run import PreparedRun
from service.stages.profile import ProfileTask, measure_profile
from service.stages.progress import Reporter, Silent
from service.stages.requantize import quantize_by_recipe
from service.stages.single_stage_requests import EvaluateRequest, QuantizeRequest
from service.stages.text_fit import check_texts
from service.stages.training import train_and_compare
from service.stages.training_task import TrainingRequest, training_task
from service.storage.stage_store import StageStore


def describe_model(reference: str, store: StageStore) -> dict[str, Any]:
    """Return what can be quantized in a model, and what stays and why, as JSON values.

    No weight is read.

    Raises:
        ModelError: the model cannot be used.
        StorageError: the disk is full.
    """
    model = model_in(store, reference, read_weights=False)
    skeleton = meta_model(model)
    layers = find_layers(skeleton)
    sizes = measure_sizes(model, skeleton, layers)
    return {
        "model": model.name,
        "original_bytes": sizes.file_bytes,
        "original_layer_bytes": sizes.layer_bytes,
        "layers": len(layers),
        **measure_coverage(skeleton).to_json(),
    }


def estimate_run(
    request: RunRequest, store: StageStore, given: Profile | None = None
) -> dict[str, Any]:
    """Return what a run would do and take, as JSON values, without reading any weight.

    Raises as `service.stages.prepare.prepare` and `service.stages.text_fit.check_texts` do.
    """
    context = RunContext.for_request(request, store, Silent(), read_weights=False)
    prepared = prepare(context, request, given)
    check_texts(context.model, request)
    return dry_run(context, request, prepared)


def profile_model(request: RunRequest, store: StageStore, reporter: Reporter) -> Profile:
    """Measure a model's profile, and what its checkpoint contains beside the layers."""
    context = RunContext.for_request(request, store, reporter)
    prepared = prepare(context, request)
    task = profile_task(context, request, prepared)
    probes = text_windows(context, request.amounts.probes)
    unquantized = measure_unquantized(context, prepared, task.candidates.calibration, probes)
    return measure_profile(context, task, unquantized)


def profile_task(context: RunContext, request: RunRequest, prepared: PreparedRun) -> ProfileTask:
    """Return everything that decides a profile; only the windows that it needs are cut."""
    calibration = text_windows(context, request.amounts.calibration)
    probes = text_windows(context, request.amounts.probes)
    return ProfileTask.for_request(request, prepared, calibration, probes)


@dataclass(frozen=True, slots=True)
class QuantizedModel:
    """A quantized checkpoint.

    Attributes:
        checkpoint: its folder, in the cache.
        source: folder of the original model, whose side files belong to the checkpoint.
        plan: its plan, which differs from the one asked for if the recipe moves outliers.
        trained: whether its layers were trained.
    """

    checkpoint: Path
    source: Path
    plan: Plan
    trained: bool


def quantize_model(
    request: QuantizeRequest, store: StageStore, reporter: Reporter
) -> QuantizedModel:
    """Quantize a model as a plan says, and train its layers.

    The trained checkpoint is kept only if it is nearer to the original on held-out windows.

    Raises:
        QuantizerError: model, plan or text cannot be used.
        RequestError: the device is missing.
    """
    context = _context(request.model, request.device, store, reporter)
    check_plan(context.model, request.plan)
    held_out_text = replace(
        request.text, windows=request.held_out_windows, skip=request.text.windows
    )
    held_out = text_windows(context, held_out_text)
    windows = quantizing_windows(context, request.text, held_out, request.effort)
    plan, checkpoint = quantize_by_recipe(
        context, request.recipe, request.plan, windows, "quantize"
    )
    wanted = TrainingRequest(request.recipe, request.effort, request.text, held_out, request.seed)
    training = training_task(context, plan, checkpoint, wanted)
    if not training.phases:
        return QuantizedModel(checkpoint, context.model.path, plan, trained=False)
    untrained = evaluate(context, {"untrained": checkpoint}, held_out, "compare", fast=True)
    result = train_and_compare(context, training, untrained["untrained"], Clock())
    trained = result is not None and result.is_nearer
    nearer = result.nearer if result else checkpoint
    return QuantizedModel(nearer, context.model.path, plan, trained)


def evaluate_checkpoints(
    request: EvaluateRequest, store: StageStore, reporter: Reporter
) -> dict[str, Quality]:
    """Score a model and quantized checkpoints of it; return qualities by name.

    Raises:
        QuantizerError: the model, a checkpoint or the text cannot be used.
        RequestError: the device is missing.
    """
    context = _context(request.model, request.device, store, reporter)
    return evaluate(context, request.checkpoints, text_windows(context, request.text))


def _context(model: str, device: str, store: StageStore, reporter: Reporter) -> RunContext:
    folder = model_in(store, model)
    return RunContext(store_for(store, folder), folder, Machine.choose(device), reporter, BATCH)
