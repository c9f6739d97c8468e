"""The command line. Exit codes.

0 done, 2 input to correct, 3 cannot be done, 130 interrupted, 1 a bug.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from allocator.signals import DEFAULT, SIGNALS
from service.cli import operations, plans
from service.cli.console import out, print_json, print_pairs, print_report, reporting, told_errors
from service.cli.files import read_text_file
from service.errors import RequestError
from service.logs import set_up_logging
from service.process import quiet_libraries
from service.report.document import Report
from service.settings import default_cache

app = typer.Typer(
    name="bitwright",
    help="Fit a language model into a byte budget: measure, optimise, quantize, prove.",
    epilog=(
        "Exit codes: 0 done, 2 input to correct, 3 cannot be done, 130 interrupted (run again to "
        "resume), 1 a bug."
    ),
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)

Model = Annotated[str, typer.Argument(help="A folder, a GGUF file, or a Hugging Face id.")]
BudgetText = Annotated[
    str,
    typer.Option("--budget", help="2.5bpw, 1.2GiB, 900MB or 123456B; counts the quantized layers."),
]
Calibration = Annotated[
    str, typer.Option(help="Text file, JSONL file, or Hugging Face dataset ID[:CONFIG[:SPLIT]].")
]
Evaluation = Annotated[str, typer.Option(help="Held-out text, given like --calibration.")]
CalibrationWindows = Annotated[int, typer.Option(help="Windows that layers are quantized on.")]
EvaluationWindows = Annotated[
    int, typer.Option(help="Windows that are scored, from the start of the text; 0 for all.")
]
Tokens = Annotated[int, typer.Option(help="Tokens in a window.")]
ProbeWindows = Annotated[
    int | None,
    typer.Option(help="Windows that effects are measured on; default: as the signal needs."),
]
ProbeTokens = Annotated[
    int | None, typer.Option(help="Tokens in a probe window; default: as the signal needs.")
]
CheckPlans = Annotated[
    int, typer.Option(help="Random plans to measure, to check the profile's predictions.")
]
GuardWindows = Annotated[
    int, typer.Option(help="Windows that finished plans are compared on before one is delivered.")
]
GroupSize = Annotated[
    int | None,
    typer.Option(help="Columns that share a scale, in all fidelities; default: by fidelity."),
]
SignalName = Annotated[
    str,
    typer.Option("--signal", help=f"How effects are measured: {', '.join(SIGNALS)}."),
]
Coupling = Annotated[
    str, typer.Option(help="Which pairs of layers the plan couples: full, block or none.")
]
Context = Annotated[
    str, typer.Option(help="What the other layers are while one is measured: uniform, or original.")
]
EffortName = Annotated[
    str,
    typer.Option("--effort", help="fast: no training; balanced, best: train what is delivered."),
]
RecipeName = Annotated[
    str,
    typer.Option(
        "--recipe",
        help="usual, or one method by itself: rtn, requant, blockwise, sgr-q, apiq, signiq.",
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Cache = Annotated[Path, typer.Option(help="Folder of finished stages.", envvar="BITWRIGHT_CACHE")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
OutFolder = Annotated[Path, typer.Option("--out", help="New or empty folder for the result.")]

_DEFAULT_CACHE = default_cache()


@app.callback()
def main() -> None:
    """Set up messages before any command runs."""
    set_up_logging()


@app.command()
def run(
    model: Model,
    budget: BudgetText,
    out_folder: OutFolder = Path("bitwright-out"),
    calibration: Calibration = "builtin:calibration",
    evaluation: Evaluation = "builtin:evaluation",
    calibration_windows: CalibrationWindows = 8,
    evaluation_windows: EvaluationWindows = 16,
    tokens: Tokens = 512,
    probe_windows: ProbeWindows = None,
    probe_tokens: ProbeTokens = None,
    check_plans: CheckPlans = 0,
    guard_windows: GuardWindows = 8,
    group_size: GroupSize = None,
    signal: SignalName = DEFAULT.name,
    coupling: Coupling = "full",
    context: Context = "uniform",
    effort: EffortName = "balanced",
    seed: Seed = 0,
    device: Device = "auto",
    cache: Cache = _DEFAULT_CACHE,
    target: plans.Target = "transformers",
    tie: plans.Ties = None,
    untie: plans.Untied = None,
    rule: plans.Rules = None,
    pool: plans.Pools = None,
    latency: plans.Latency = None,
    max_latency_us: plans.MostLatency = None,
    distinct: plans.Distinct = None,
    whole_file: Annotated[
        bool, typer.Option("--whole-file", help="The budget includes what is not quantized.")
    ] = False,
    embeddings: Annotated[
        str,
        typer.Option(
            help=(
                "Quantize embedding and head too, under --whole-file: auto (where nothing else "
                "fits), keep or join."
            )
        ),
    ] = "auto",
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Say sizes, memory and time; touch no weights.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Squeeze MODEL into a budget, and prove the result on held-out text."""
    with told_errors(as_json=as_json):
        from service import pipeline, single_stages  # noqa: PLC0415  --help must not wait for torch
        from service.report.deliver import check_output, deliver  # noqa: PLC0415
        from service.request.request import make_request  # noqa: PLC0415
        from service.storage.stage_store import StageStore  # noqa: PLC0415

        request = make_request(
            model, budget, calibration=calibration, evaluation=evaluation, calibration_windows=calibration_windows,
            evaluation_windows=evaluation_windows, tokens=tokens, probe_windows=probe_windows, probe_tokens=probe_tokens,
            check_plans=check_plans, guard_windows=guard_windows, group_size=group_size, signal=signal, coupling=coupling,
            context=context, effort=effort, seed=seed, device=device, whole_file=whole_file,
            embeddings=embeddings,
            constraints=plans.constraints_of(target, tie, untie, rule, pool, latency, max_latency_us, distinct),
        )  # fmt: skip
        store = StageStore(cache)
        if dry:
            print_pairs(single_stages.estimate_run(request, store), as_json=as_json)
            return
        check_output(out_folder)
        with reporting() as reporter:
            report, checkpoint = pipeline.run(request, store, reporter)
        deliver(out_folder, checkpoint, report)
        if as_json:
            print_json(report.to_json())
            return
        print_report(report)
        out.print(f"checkpoint: {out_folder.resolve()}", markup=False)
        out.print(f"report: {out_folder.resolve() / 'report.html'}", markup=False)


@app.command()
def profile(
    model: Model,
    budget: BudgetText,
    out_folder: OutFolder = Path("bitwright-profile"),
    calibration: Calibration = "builtin:calibration",
    calibration_windows: CalibrationWindows = 8,
    tokens: Tokens = 512,
    probe_windows: ProbeWindows = None,
    probe_tokens: ProbeTokens = None,
    group_size: GroupSize = None,
    signal: SignalName = DEFAULT.name,
    context: Context = "uniform",
    seed: Seed = 0,
    device: Device = "auto",
    cache: Cache = _DEFAULT_CACHE,
    as_json: AsJson = False,
) -> None:
    """Measure what each layer of MODEL costs at each fidelity, around a uniform plan near the budget."""
    with told_errors(as_json=as_json):
        from service import single_stages  # noqa: PLC0415  --help must not wait for torch
        from service.report.deliver import deliver  # noqa: PLC0415
        from service.request.request import make_request  # noqa: PLC0415
        from service.storage.stage_store import StageStore  # noqa: PLC0415

        request = make_request(
            model, budget, calibration=calibration, calibration_windows=calibration_windows, tokens=tokens,
            probe_windows=probe_windows, probe_tokens=probe_tokens, group_size=group_size, signal=signal, context=context,
            seed=seed, device=device,
        )  # fmt: skip
        with reporting() as reporter:
            measured, folder = single_stages.profile_model(request, StageStore(cache), reporter)
        deliver(out_folder, folder, None)
        low, high = measured.budget_range
        summary = {
            "profile": str(out_folder.resolve()),
            "layers": len(measured.layers),
            "fidelities": [fidelity.name for fidelity in measured.fidelities],
            "signal": measured.signal,
            "context": "original"
            if measured.context is None
            else measured.fidelities[measured.context].name,
            "context_kl_nats_per_token": measured.context_loss,
            "coupling_rank": measured.factor.shape[0],
            "budget_range_bytes": [low, high],
        }
        print_pairs(summary, as_json=as_json)


app.command()(plans.plan)
app.command()(plans.frontier)
app.command()(plans.diff)


@app.command()
def quantize(
    model: Model,
    plan_file: Annotated[
        Path, typer.Option("--plan", help="Plan that `bitwright plan` wrote, or that you edited.")
    ],
    out_folder: OutFolder = Path("bitwright-out"),
    calibration: Calibration = "builtin:calibration",
    calibration_windows: CalibrationWindows = 8,
    guard_windows: GuardWindows = 8,
    tokens: Tokens = 512,
    effort: EffortName = "balanced",
    recipe: RecipeName = "usual",
    seed: Seed = 0,
    device: Device = "auto",
    cache: Cache = _DEFAULT_CACHE,
    as_json: AsJson = False,
) -> None:
    """Quantize MODEL as a plan says, into a folder that transformers loads."""
    with told_errors(as_json=as_json):
        from quantizer.plans.plan import Plan  # noqa: PLC0415
        from quantizer.texts.text import TextSpec  # noqa: PLC0415
        from service import single_stages  # noqa: PLC0415  --help must not wait for torch
        from service.report.deliver import check_output, deliver  # noqa: PLC0415
        from service.request.effort import find_effort  # noqa: PLC0415
        from service.stages.recipe import find_recipe  # noqa: PLC0415
        from service.storage.stage_store import StageStore  # noqa: PLC0415

        check_output(out_folder)
        request = single_stages.QuantizeRequest(
            model=model,
            plan=Plan.loads(read_text_file(plan_file, "plan")),
            text=TextSpec(calibration, calibration_windows, tokens, seed),
            held_out_windows=guard_windows,
            effort=find_effort(effort),
            recipe=find_recipe(recipe),
            seed=seed,
            device=device,
        )
        with reporting() as reporter:
            quantized = single_stages.quantize_model(request, StageStore(cache), reporter)
        deliver(out_folder, quantized.checkpoint, None)
        summary = {
            "checkpoint": str(out_folder.resolve()),
            "trained": quantized.trained,
            "plan_bytes": quantized.plan.weight_bytes,
            "bits_per_weight": quantized.plan.bits_per_weight,
        }
        print_pairs(summary, as_json=as_json)


@app.command()
def evaluate(
    model: Model,
    checkpoints: Annotated[
        list[Path], typer.Argument(help="Quantized checkpoints to compare with it.")
    ],
    evaluation: Evaluation = "builtin:evaluation",
    evaluation_windows: EvaluationWindows = 16,
    tokens: Tokens = 512,
    device: Device = "auto",
    cache: Cache = _DEFAULT_CACHE,
    as_json: AsJson = False,
) -> None:
    """Score MODEL and quantized checkpoints of it.

    Perplexity and KL divergence, with standard errors.
    """
    with told_errors(as_json=as_json):
        from quantizer.texts.text import TextSpec  # noqa: PLC0415
        from service import single_stages  # noqa: PLC0415  --help must not wait for torch
        from service.storage.stage_store import StageStore  # noqa: PLC0415

        for path in checkpoints:
            if not (path / "plan.json").is_file():
                raise RequestError(
                    f"checkpoint {str(path)!r} is no folder that bitwright wrote: it has no "
                    "plan.json"
                )
        request = single_stages.EvaluateRequest(
            model=model,
            checkpoints={str(path): path for path in checkpoints},
            text=TextSpec(evaluation, evaluation_windows, tokens, None),
            device=device,
        )
        with reporting() as reporter:
            scores = single_stages.evaluate_checkpoints(request, StageStore(cache), reporter)
        print_pairs({name: score.to_json() for name, score in scores.items()}, as_json=as_json)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Output folder of `bitwright run`.")],
    as_json: AsJson = False,
) -> None:
    """Show the report of a finished run."""
    with told_errors(as_json=as_json):
        try:
            document = json.loads(read_text_file(folder / "report.json", "report"))
        except ValueError as error:
            raise RequestError(f"report in {str(folder)!r} is not JSON: {error}") from error
        if as_json:
            print_json(document)
        else:
            print_report(Report.from_json(document))


app.command()(operations.serve)
app.command()(operations.worker)
app.command()(operations.migrate)
app.command()(operations.quota)
app.add_typer(operations.keys)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine offers: versions, processor, memory, GPU, cache."""
    from service.cli.doctor import examine  # noqa: PLC0415

    print_pairs(examine(default_cache()), as_json=as_json)


def entry() -> None:
    """Run the command line."""
    quiet_libraries()
    app()


if __name__ == "__main__":
    entry()
