"""Score HQQ as its own library makes it, at the bytes of the other quantizers' rows.

Its zero points have 16 bits.

    pip install hqq
    python -m tests.benchmarks.hqq MODEL --label NAME --evaluation TEXT --cache FOLDER
    python -m tests.benchmarks.hqq ... --whole

Appends one row for each budget and direction of groups to results/quantizers.jsonl. Scale and zero
point of a group are rounded to 16 bits each, and a layer's bytes are those of dense codes, scales
and zero points: out * in * (bits / 8 + 4 / group size). Weights are scored dense, as products of
packed layers would give the same; so there is no memory to compare. The library's groups run on
from row to row of the output.
"""

import argparse
import copy
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hqq.core.quantize import Quantizer
from torch import Tensor, nn

from quantizer.durable import PartStore
from quantizer.kernels.precision import matmul_autocast
from quantizer.models.loading import load_model
from quantizer.models.source import find_model
from quantizer.modules.linear import get_linear
from quantizer.running.evaluate import evaluate_models
from quantizer.structure.blocks import find_layers
from quantizer.texts.text import TextSpec
from service.cli.progress import Lines
from service.process import keep_freed_memory
from service.request.request import BATCH
from service.stages.calibration_windows import text_windows
from service.stages.context import RunContext
from service.stages.machine import Machine
from service.storage.cache_entry import MODELS
from service.storage.stage_store import StageStore
from tests.benchmarks.quantizers import ALL, OTHER, store_rows
from tests.benchmarks.record import circumstances

GRIDS = {"2.3": (2, 108), "2.5": (2, 64), "3.0": (2, 32), "4.25": (4, 128)}
"""Code width and group size that come to a budget, to 0.2 %."""
INPUTS, OUTPUTS = 1, 0
"""Axes that groups run along.

Neighbours among inputs, which kernels read together, or the library's other choice.
"""
NAMES = {INPUTS: "HQQ", OUTPUTS: "HQQ, groups of outputs"}


def rounded(weight: Tensor, bits: int, group_size: int, axis: int) -> Tensor:
    """Return a weight after HQQ's rounding, as 16-bit scales and zero points give it back."""
    codes, found = Quantizer.quantize(
        weight,
        nbits=bits,
        group_size=group_size,
        round_zero=bits == 4,
        axis=axis,
        bitpack=False,
        device="cpu",
    )
    result: Tensor = (codes - found["zero"].half().float()) * found["scale"].half().float()
    return result.reshape(weight.shape)


def quantize(model: nn.Module, bits: int, group_size: int, axis: int) -> int:
    """Round every layer of a model in place; return the bytes they would take."""
    total = 0
    for layer in find_layers(model):
        linear = get_linear(model, layer.name)
        linear.weight.data = rounded(linear.weight.data, bits, group_size, axis)
        total += linear.weight.numel() * (bits * group_size + 32) // (8 * group_size)
    return total


def row_of(
    arguments: argparse.Namespace, original: Any, texts: dict[str, Tensor], budget: str, axis: int
) -> dict[str, Any]:
    """Quantize and score; return the row."""
    model = copy.deepcopy(original)
    start, processor_start = time.monotonic(), time.process_time()
    size = quantize(model, *GRIDS[budget], axis)
    seconds, processor_seconds = time.monotonic() - start, time.process_time() - processor_start
    quality: dict[str, Any] = {}
    before: dict[str, Any] = {}
    for name, windows in texts.items():
        models = {"original": original, "it": model}
        with tempfile.TemporaryDirectory() as folder:
            scores = evaluate_models(
                models, "original", windows, 8, PartStore(Path(folder)), lambda *_: None
            )
        before[name], quality[name] = scores["original"].to_json(), scores["it"].to_json()
    weights = sum(layer.weights for layer in find_layers(model))
    return {
        "model": arguments.label,
        "budget_bpw": float(budget),
        "method": NAMES[axis],
        "plan_bytes": size,
        "bits_per_weight": 8 * size / weights,
        "quality": quality,
        "original": before,
        "phases": [],
        "seconds": {"quantize": seconds},
        "processor_seconds": {"quantize": processor_seconds},
        "circumstances": circumstances(),
    }


def whole_rows(
    arguments: argparse.Namespace, original: Any, windows: Tensor, machine: Machine
) -> list[dict[str, Any]]:
    """Score all that is asked for on all of the text at once.

    Return what that adds to their rows.
    """
    models = {
        (budget, axis): copy.deepcopy(original) for budget in arguments.budgets for axis in NAMES
    }
    for (budget, axis), model in models.items():
        quantize(model, *GRIDS[budget], axis)
    known = {"original": original} | {
        f"{budget} {NAMES[axis]}": model for (budget, axis), model in models.items()
    }
    with (
        tempfile.TemporaryDirectory() as folder,
        matmul_autocast(machine.precision, torch.device(machine.device)),
    ):
        scores = evaluate_models(
            known, "original", windows, 8, PartStore(Path(folder)), Lines().step("whole text")
        )
    found = {name: quality.to_json() for name, quality in scores.items()}
    return [
        {"model": arguments.label, "budget_bpw": float(budget), "method": NAMES[axis]}
        | {"quality": {ALL: found[f"{budget} {NAMES[axis]}"]}, "original": {ALL: found["original"]}}
        | {"circumstances": circumstances()}
        for budget, axis in models
    ]


def main() -> None:
    """Measure and store the rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--label", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--budgets", nargs="+", default=list(GRIDS), choices=list(GRIDS))
    parser.add_argument(
        "--whole",
        action="store_true",
        help="score on all of the evaluation text, beside rows measured before",
    )
    arguments = parser.parse_args()
    keep_freed_memory()
    store = StageStore(arguments.cache)
    machine = Machine.choose("cpu")
    folder = find_model(arguments.model, store.root / MODELS)
    context = RunContext(store, folder, machine, Lines(), BATCH)
    original = load_model(folder, machine.dtype, machine.device)
    held_out = TextSpec(arguments.evaluation, 16, 512, None)
    if arguments.whole:
        text = text_windows(context, replace(held_out, windows=0))
        store_rows(whole_rows(arguments, original, text.tokens, machine))
        return
    specs = {"held out": held_out, "other": TextSpec(OTHER, 16, 512, None)}
    texts = {name: text_windows(context, spec).tokens for name, spec in specs.items()}
    for budget in arguments.budgets:
        for axis, name in NAMES.items():
            row = row_of(arguments, original, texts, budget, axis)
            store_rows([row])
            here = row["quality"]["held out"]
            print(
                f"{budget} {name:24} {here['perplexity']:.1f} KL {here['kl_nats_per_token']:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
