"""The commands that run a model: their options. What they do is in `service.cli.model_work`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from service.cli.files import read_latency
from service.cli.late import LateModule
from service.cli.parameters import OPTIONS, AsJson, Cache, LatencyFile, OutFolder
from service.request.constraints import PlanConstraints
from service.request.options import (
    EvaluateSettings,
    ModelOption,
    ProfileSettings,
    QuantizeSettings,
    RunSettings,
)
from service.settings import default_cache

if TYPE_CHECKING:
    from service.cli import model_work
else:
    model_work = LateModule("service.cli.model_work")

CACHE = default_cache()
FREE = PlanConstraints()


QUANTIZE, EVALUATE = QuantizeSettings(), EvaluateSettings()


def run(
    source: Annotated[ModelOption, OPTIONS],
    /,
    *,
    options: Annotated[RunSettings, OPTIONS],
    constraints: Annotated[PlanConstraints, OPTIONS] = FREE,
    latency: LatencyFile = None,
    out_folder: OutFolder = Path("bitwright-out"),
    cache: Cache = CACHE,
    dry_run: Annotated[
        bool, Parameter(help="Print sizes, memory and time, without reading weights.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Quantize a model within a budget, and evaluate the result on held-out text."""
    request = options.request(source.model, constraints.constraints(read_latency(latency)))
    if dry_run:
        model_work.estimate(request, cache, as_json=as_json)
    else:
        model_work.run(request, out_folder, cache, as_json=as_json)


def profile(
    source: Annotated[ModelOption, OPTIONS],
    /,
    *,
    options: Annotated[ProfileSettings, OPTIONS],
    out_folder: OutFolder = Path("bitwright-profile"),
    cache: Cache = CACHE,
    as_json: AsJson = False,
) -> None:
    """Measure what quantizing each layer costs, around a uniform plan near the budget."""
    request = RunSettings(**options.model_dump()).request(source.model)
    model_work.profile(request, out_folder, cache, as_json=as_json)


def quantize(
    source: Annotated[ModelOption, OPTIONS],
    /,
    *,
    plan_file: Annotated[
        Path, Parameter(help="Plan that `bitwright plan` wrote, or that you edited.")
    ],
    options: Annotated[QuantizeSettings, OPTIONS] = QUANTIZE,
    out_folder: OutFolder = Path("bitwright-out"),
    cache: Cache = CACHE,
    as_json: AsJson = False,
) -> None:
    """Quantize a model by a plan, into a folder that transformers loads."""
    model_work.quantize(source.model, plan_file, options, out_folder, cache, as_json=as_json)


def evaluate(
    source: Annotated[ModelOption, OPTIONS],
    checkpoints: Annotated[list[Path], Parameter(help="Quantized checkpoints to compare with it.")],
    /,
    *,
    options: Annotated[EvaluateSettings, OPTIONS] = EVALUATE,
    cache: Cache = CACHE,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity and KL divergence of checkpoints, with standard errors."""
    model_work.evaluate(source.model, checkpoints, options, cache, as_json=as_json)
