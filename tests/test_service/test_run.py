"""The main job, end to end, on tiny models of several families."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import quantizer  # noqa: F401  teaches transformers the format
from quantizer.conversion.checkpoint import quantized_bytes
from quantizer.kernels.path import choose_kernel_path
from quantizer.plans.plan import Plan
from service.request.request import BATCH
from service.storage.stage_store import MANIFEST
from tests.support.commands import SmallRun, bitwright, bitwright_json, run_options
from tests.support.reports import check_report
from tests.support.sampling import sampled
from tests.support.tiny_models import save_tiny


@pytest.mark.parametrize(
    "family",
    sampled(
        ["llama", "qwen2", "qwen3", "mistral", "gemma3", "opt", "gpt_neox"],
        lambda family: family not in {"qwen2", "mistral"},  # whose parts the others have
    ),
)
def test_run_makes_a_loadable_checkpoint_of_exactly_the_planned_bytes(
    family: str, tmp_path: Path
) -> None:
    model, out = save_tiny(tmp_path / "model", family), tmp_path / "out"
    report = bitwright_json(*run_options(model, tmp_path / "cache", out))

    check_report(report)
    plan = Plan.loads((out / "plan.json").read_text())
    assert (
        report["plan_bytes"]
        == plan.weight_bytes
        == quantized_bytes(out, plan)
        <= report["budget_bytes"]
    )
    assert report["bits_per_weight"] <= 4
    assert json.loads((out / "report.json").read_text()) == report
    loaded = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    prompt = tokenizer("The import statement", return_tensors="pt").input_ids
    assert (
        loaded.generate(prompt, max_new_tokens=4, do_sample=False).shape[1] == prompt.shape[1] + 4
    )
    assert loaded.dtype == torch.bfloat16


def test_report_has_the_fields_that_pipelines_rely_on(small_run: SmallRun) -> None:
    report = small_run.report

    for field in (
        "budget_bytes",
        "plan_bytes",
        "bits_per_weight",
        "checkpoint_bytes",
        "original_bytes",
        "unquantized_bytes",
    ):
        assert report[field] > 0, field
    assert report["schema"] == "bitwright.report/1"
    assert report["checkpoint_bytes"] == sum(
        file.stat().st_size for file in small_run.out.glob("*.safetensors")
    )
    assert report["checkpoint_bytes"] - report["unquantized_bytes"] == report["plan_bytes"]
    for name in ("original", "uniform", "plan"):
        quality = report["evaluation"][name]
        assert quality["perplexity"] > 1
        assert quality["perplexity_stderr"] > 0
        assert (quality["kl_nats_per_token"] == 0) == (name == "original")
    assert report["uniform_bytes"] <= report["budget_bytes"]
    assert (
        set(report["plan"]["layers"])
        == set(report["damage_nats_per_token"])
        == set(report["uniform"])
    )


def test_report_page_is_one_file_that_fetches_nothing(small_run: SmallRun) -> None:
    page = (small_run.out / "report.html").read_text()

    assert page.count("<svg") == 4
    assert "<script" not in page
    assert "src=" not in page
    assert "default-src 'none'" in page
    assert "bits per weight" in page
    table = pd.read_csv(small_run.out / "layers.csv")
    report = json.loads((small_run.out / "report.json").read_text())
    assert table.weight_bytes.sum() == report["plan_bytes"]
    assert list(table.layer) == list(report["plan"]["layers"])
    shown = bitwright("report", small_run.out)
    assert shown.returncode == 0
    assert "uniform" in shown.stdout


@pytest.mark.parametrize(
    "method",
    [("output",), ("output", "--context", "original"), ("gradient",), ("noise",), ("hessian",)],
    ids=str,
)
def test_every_signal_runs_and_the_best_plan_on_unseen_text_is_delivered(
    tiny_llama: Path, tmp_path: Path, warm_cache: Path, method: tuple[str, ...]
) -> None:
    report = bitwright_json(
        *run_options(tiny_llama, warm_cache, tmp_path / "out"), "--signal", *method
    )

    guard = report["guard"]
    loss = {name: found["kl_nats_per_token"] for name, found in guard["candidates"].items()}
    uniform = {name: found for name, found in loss.items() if name.startswith("uniform")}
    assert "plan" in loss
    assert loss[guard["uniform"]] == min(uniform.values())
    assert loss[guard["delivered"]] == min(loss.values())
    assert guard["lead_over_uniform"] == pytest.approx(
        1 - loss[guard["delivered"]] / loss[guard["uniform"]]
    )
    assert any("instead of the solver's plan" in note for note in report["notes"]) == (
        guard["delivered"] != "plan"
    )
    assert report["profile"]["signal"] == method[0]
    plan = Plan.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan.weight_bytes == report["plan_bytes"] == quantized_bytes(tmp_path / "out", plan)
    delivered = {name: fidelity.name for name, fidelity in plan.by_name.items()}
    assert delivered == {name: row["fidelity"] for name, row in report["plan"]["layers"].items()}
    assert (guard["delivered"] == guard["uniform"]) <= (delivered == report["uniform"])


def test_random_plans_check_the_predictions(
    tiny_llama: Path, tmp_path: Path, warm_cache: Path
) -> None:
    options = run_options(tiny_llama, warm_cache, tmp_path / "out")
    report = bitwright_json(*options, "--check-plans", "12")
    check_report(report)
    checks = report["checks"]

    assert len(checks["plans"]) == 12
    assert len({row["measured_kl_nats_per_token"] for row in checks["plans"]}) == 12
    predicted = pd.Series([row["predicted_kl_nats_per_token"] for row in checks["plans"]])
    measured = pd.Series([row["measured_kl_nats_per_token"] for row in checks["plans"]])
    assert checks["spearman"] == pytest.approx(predicted.corr(measured, method="spearman"))
    assert checks["spearman"] > 0.5
    assert (tmp_path / "out" / "report.html").read_text().count("<svg") == 5


def test_group_size_holds_for_all_layers(
    tiny_llama: Path, tmp_path: Path, warm_cache: Path
) -> None:
    bitwright_json(*run_options(tiny_llama, warm_cache, tmp_path / "out"), "--group-size", "32")
    plan = Plan.loads((tmp_path / "out" / "plan.json").read_text())

    assert {fidelity.group_size for fidelity in plan.fidelities} == {32}


def test_constraints_hold_for_what_is_delivered(
    tiny_llama: Path, tmp_path: Path, warm_cache: Path
) -> None:
    demands = (
        "--target",
        "vllm",
        "--rule",
        "*.down_proj>=3",
        "--rule",
        "model.layers.0.self_attn.o_proj=int4g64s6",
    )
    report = bitwright_json(*run_options(tiny_llama, warm_cache, tmp_path / "out"), *demands)
    chosen = Plan.loads((tmp_path / "out" / "plan.json").read_text()).by_name

    assert report["constraints"]["rules"] == list(demands[3::2])
    assert report["guard"]["delivered"] in ("plan", "additive")
    assert chosen["model.layers.0.self_attn.o_proj"].name == "int4g64s6"
    assert all(
        fidelity.bits_lo >= 3 for name, fidelity in chosen.items() if name.endswith("down_proj")
    )
    for block in range(2):
        assert len({chosen[f"model.layers.{block}.self_attn.{kind}_proj"] for kind in "qkv"}) == 1
        assert (
            len({chosen[f"model.layers.{block}.mlp.{kind}_proj"] for kind in ("gate", "up")}) == 1
        )


@pytest.mark.parametrize(
    ("demand", "code", "message"),
    [
        ("*.nothing>=2", 2, "matches no layer"),
        ("*>=2.5", 3, "what binds: *>=2.5"),
        ("nonsense", 2, "write PATTERN"),
    ],
)
def test_constraints_that_cannot_be_met_are_refused_before_anything_is_measured(
    tiny_llama: Path, tmp_path: Path, demand: str, code: int, message: str
) -> None:
    done = bitwright(
        *run_options(tiny_llama, tmp_path / "cache", tmp_path / "out", "3bpw"), "--rule", demand
    )
    assert done.returncode == code
    assert message in done.stderr
    assert not (tmp_path / "cache" / "candidates").exists()
    assert not (tmp_path / "cache" / "profile").exists()


def test_second_budget_near_by_reuses_the_profile(
    tiny_llama: Path, tmp_path: Path, small_run: SmallRun, warm_cache: Path
) -> None:
    cache, first = warm_cache, small_run.report
    profiles = sorted(path.name for path in (cache / "profile").iterdir())
    second = bitwright_json(*run_options(tiny_llama, cache, tmp_path / "two", "4.1bpw"))

    assert sorted(path.name for path in (cache / "profile").iterdir()) == profiles
    assert second["plan_bytes"] >= first["plan_bytes"]
    assert second["damage_nats_per_token"] == first["damage_nats_per_token"]


def test_same_run_twice_takes_everything_from_the_cache(
    tiny_llama: Path, tmp_path: Path, small_run: SmallRun, warm_cache: Path
) -> None:
    before = _written_at(warm_cache)
    second = bitwright_json(*run_options(tiny_llama, warm_cache, tmp_path / "two"))

    assert _written_at(warm_cache) == before
    assert second["evaluation"] == small_run.report["evaluation"]


def _written_at(cache: Path) -> dict[Path, int]:
    """Return when each result in a cache was written; manifests say when it was last used."""
    results = (path for path in cache.glob("*/*/**/*") if path.is_file())
    return {path: path.stat().st_mtime_ns for path in results if path.name != MANIFEST}


def test_stages_on_their_own_give_what_run_gives(
    tiny_llama: Path, tmp_path: Path, small_run: SmallRun
) -> None:
    shared = ["--cache", str(tmp_path / "other"), "--calibration-windows", "4", "--tokens", "64"]
    probing = ["--probe-windows", "3", "--probe-tokens", "32"]
    bitwright_json(
        "profile", tiny_llama, "--budget", "4bpw", "--out", tmp_path / "profile", *shared, *probing
    )
    bitwright_json(
        "plan", tmp_path / "profile", "--budget", "4bpw", "--out", tmp_path / "plan.json"
    )
    out = tmp_path / "quantized"
    bitwright_json(
        "quantize",
        tiny_llama,
        "--plan",
        tmp_path / "plan.json",
        "--out",
        out,
        "--effort",
        "fast",
        *shared,
    )
    scores = bitwright_json(
        *("evaluate", tiny_llama, out, "--cache", tmp_path / "other"),
        *("--evaluation-windows", "3", "--tokens", "64"),
    )

    weights = "model.safetensors"
    assert (out / weights).read_bytes() == (small_run.out / weights).read_bytes()
    assert scores[str(out)] == small_run.report["evaluation"]["plan"]


def test_dry_run_says_sizes_and_stores_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    estimate = bitwright_json(
        *run_options(tiny_llama, tmp_path / "cache", tmp_path / "out"), "--dry-run"
    )

    assert estimate["layers"] == 21
    assert estimate["uniform_bytes"] <= estimate["budget_bytes"]
    assert estimate["seconds"] >= 0
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "cache" / "profile").exists()


def test_dry_run_counts_the_logits_of_longer_windows(tiny_llama: Path, tmp_path: Path) -> None:
    options = run_options(tiny_llama, tmp_path / "cache", tmp_path / "out")
    vocabulary = AutoConfig.from_pretrained(tiny_llama).vocab_size
    short, long = (
        bitwright_json(*options, "--tokens", tokens, "--dry-run")["peak_memory_bytes"]
        for tokens in ("64", "8192")
    )

    batch, float_bytes = BATCH, 4
    assert long - short >= batch * (8192 - 64) * vocabulary * float_bytes


def test_budget_of_the_whole_file_is_kept_by_the_whole_file(
    tiny_llama: Path, tmp_path: Path, warm_cache: Path
) -> None:
    report = bitwright_json(*run_options(tiny_llama, warm_cache, tmp_path / "out", "103kB"))

    assert report["checkpoint_bytes"] <= 103_000


def test_doctor_states_versions_and_device() -> None:
    document = bitwright_json("doctor")

    assert (
        document["torch"] == torch.__version__.removesuffix("+cpu")
        or document["torch"] == torch.__version__
    )
    assert document["device"] in {"cpu", "cuda"}
    path = choose_kernel_path(document["device"])
    assert document["kernels"] == f"{path.name}: {path.reason}"
