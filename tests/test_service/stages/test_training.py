"""Training of the delivered plan.

It is nearer to the original at the same bytes, is never trained on held-out windows, and can be
interrupted.
"""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import quantizer  # noqa: F401  teaches transformers the format
from quantizer.conversion.checkpoint import quantized_bytes, read_weights
from quantizer.plans.plan import Plan
from quantizer.texts.text import TextSpec
from service.errors import RequestError
from service.request.effort import EFFORTS, find_effort
from service.stages.calibration_windows import quantizing_windows, text_windows
from service.stages.recipe import BLOCKS, MODEL
from service.stages.training import train
from service.stages.training_phases import choose_phases
from service.stages.training_task import TrainingTask, training_windows
from tests.support.commands import SMALL, SmallRun, bitwright_json, run_options, stop_when
from tests.support.reports import check_report
from tests.support.run_contexts import run_context

GIGABYTE = 10**9


@pytest.fixture(scope="module")
def balanced(
    tiny_llama: Path, module_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> SmallRun:
    """A run with effort balanced that nothing disturbed."""
    out = tmp_path_factory.mktemp("balanced") / "out"
    options = [*run_options(tiny_llama, module_cache, out), "--effort", "balanced"]
    return SmallRun(module_cache, out, bitwright_json(*options))


def test_balanced_effort_trains_the_plan_and_keeps_its_bytes(
    small_run: SmallRun, balanced: SmallRun
) -> None:
    fast, report = small_run.report, balanced.report

    check_report(report)
    assert fast["tuning"] == {"effort": "fast", "phases": [], "windows": 0}
    assert fast["guard"]["tuned"] is None
    assert "untuned" not in fast["evaluation"]
    losses = {name: report["evaluation"][name]["kl_nats_per_token"] for name in ("plan", "untuned")}
    assert losses["plan"] < 0.95 * min(
        losses["untuned"], fast["evaluation"]["plan"]["kl_nats_per_token"]
    )
    assert report["plan"]["layers"] == fast["plan"]["layers"]
    predicted = [
        found["prediction"]["plan"]["predicted_kl_nats_per_token"] for found in (report, fast)
    ]
    assert predicted[0] == predicted[1]
    assert report["tuning"]["effort"] == "balanced"
    assert [phase["kind"] for phase in report["tuning"]["phases"]] == ["model"]
    tuned, untuned = (
        report["guard"]["tuned"],
        report["guard"]["candidates"][report["guard"]["delivered"]],
    )
    assert tuned["kl_nats_per_token"] < untuned["kl_nats_per_token"]
    plan = Plan.loads((balanced.out / "plan.json").read_text())
    assert quantized_bytes(balanced.out, plan) == plan.weight_bytes == report["plan_bytes"]
    assert AutoModelForCausalLM.from_pretrained(balanced.out).dtype == torch.bfloat16
    assert "plan, before training" in (balanced.out / "report.html").read_text()


def test_killed_training_goes_on_where_it_was_saved_and_ends_the_same(
    tiny_llama: Path, tmp_path: Path, balanced: SmallRun
) -> None:
    cache, out = Path(shutil.copytree(balanced.cache, tmp_path / "cache")), tmp_path / "out"
    shutil.rmtree(cache / "tuned")
    options = [*run_options(tiny_llama, cache, out), "--effort", "balanced"]
    stop_when(
        options,
        lambda: any((cache / "tuned").glob("*.work/teacher-*.part")),
        signal.SIGKILL,
    )
    assert not out.exists()
    bitwright_json(*options)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (balanced.out, out)]
    assert weights[0] == weights[1]


def test_held_out_windows_are_never_trained_on(tiny_llama: Path, tmp_path: Path) -> None:
    context = run_context(tiny_llama, tmp_path)
    text = TextSpec("builtin:calibration", 4, 64, 0)
    guard = text_windows(context, TextSpec("builtin:calibration", 40, 64, 0, skip=7))
    every = text_windows(context, TextSpec("builtin:calibration", 0, 64, None))
    phases = choose_phases(find_effort("best"), 1000, GIGABYTE, 4, torch.float32, 0)
    chosen = training_windows(context, text, phases, guard)

    held_out = {tuple(row.tolist()) for row in guard.tokens}
    rows = [tuple(row.tolist()) for row in chosen.tokens]
    assert not held_out & set(rows)
    assert len(rows) == min(1600, sum(tuple(row.tolist()) not in held_out for row in every.tokens))
    few = training_windows(
        context,
        text,
        choose_phases(find_effort("balanced"), 1000, GIGABYTE, 1, torch.float32, 0),
        guard,
    )
    assert len(few.tokens) == 100
    assert {tuple(row.tolist()) for row in few.tokens} <= set(rows) | {
        tuple(row.tolist()) for row in every.tokens
    } - held_out


@pytest.mark.parametrize(("effort", "count"), [("fast", 4), ("balanced", 16), ("best", 32)])
def test_more_effort_quantizes_on_more_windows_but_never_on_held_out_ones(
    effort: str, count: int, tiny_llama: Path, tmp_path: Path
) -> None:
    context = run_context(tiny_llama, tmp_path)
    text = TextSpec("builtin:calibration", 4, 64, 0)
    guard = text_windows(context, TextSpec("builtin:calibration", 40, 64, 0, skip=7))
    chosen = quantizing_windows(context, text, guard, find_effort(effort))
    rows = {tuple(row.tolist()) for row in chosen.tokens}
    assert len(chosen.tokens) == count
    assert not rows & {tuple(row.tolist()) for row in guard.tokens}
    if effort == "fast":
        assert torch.equal(chosen.tokens, text_windows(context, text).tokens)


def test_models_too_large_to_train_whole_are_trained_block_by_block() -> None:
    for effort in EFFORTS.values():
        small = choose_phases(effort, 10**8, 16 * GIGABYTE, 4, torch.float32, 0)
        large = choose_phases(effort, 8 * 10**9, 80 * GIGABYTE, 4, torch.float32, 0)
        if effort.name == "fast":
            assert small == large == ()
            continue
        assert [(phase.kind, phase.spec.trained) for phase in small] == [(MODEL, "codes")]
        assert [(phase.kind, phase.spec.trained) for phase in large] == [
            (BLOCKS, "codes"),
            (MODEL, "scales"),
        ]
        assert small[0].spec.steps == large[1].spec.steps == effort.steps


def test_training_by_blocks_and_then_scales_helps_too(
    tiny_llama: Path, small_run: SmallRun, module_cache: Path
) -> None:
    fast, context = small_run.out, run_context(tiny_llama, module_cache)
    plan = Plan.loads((fast / "plan.json").read_text())
    phases = choose_phases(find_effort("balanced"), 10**12, GIGABYTE, 4, torch.float32, 0)
    guard = text_windows(context, TextSpec("builtin:calibration", 2, 64, 0, skip=7))
    windows = training_windows(context, TextSpec("builtin:calibration", 4, 64, 0), phases, guard)
    task = TrainingTask(fast, plan, windows, guard, phases)
    folder = train(context, task)

    assert (folder / "plan.json").read_text() == (fast / "plan.json").read_text()
    assert read_weights(folder, plan).keys() == plan.by_name.keys()
    scores = bitwright_json(
        "evaluate",
        tiny_llama,
        folder,
        fast,
        "--evaluation-windows",
        "3",
        "--tokens",
        "64",
        "--cache",
        module_cache,
    )
    trained, before = (
        scores[str(folder)]["kl_nats_per_token"],
        scores[str(fast)]["kl_nats_per_token"],
    )
    assert before == pytest.approx(small_run.report["evaluation"]["plan"]["kl_nats_per_token"])
    assert trained < 0.95 * before
    assert train(context, task) == folder
    assert (
        json.loads((folder.parent / "manifest.json").read_text())["inputs"]["phases"][1]["trained"]
        == "scales"
    )


def test_a_given_plan_is_trained_too(
    tiny_llama: Path, tmp_path: Path, small_run: SmallRun, module_cache: Path
) -> None:
    shared = ("--plan", small_run.out / "plan.json", "--cache", module_cache, *SMALL[:4])
    found = {
        effort: bitwright_json(
            "quantize", tiny_llama, "--out", tmp_path / effort, "--effort", effort, *shared
        )
        for effort in ("fast", "balanced")
    }
    assert [found[effort]["trained"] for effort in ("fast", "balanced")] == [False, True]
    folders = [tmp_path / effort for effort in found]
    scores = bitwright_json(
        "evaluate", tiny_llama, *folders, "--tokens", "64", "--cache", module_cache
    )
    fast, balanced = (scores[str(folder)]["kl_nats_per_token"] for folder in folders)
    assert balanced < 0.95 * fast


def test_unknown_efforts_are_refused() -> None:
    with pytest.raises(
        RequestError, match="'heroic' does not exist; use one of fast, balanced, best"
    ):
        find_effort("heroic")
