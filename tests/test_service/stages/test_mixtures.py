"""Mixtures of experts and transposed layers, from a folder to a checkpoint that generates."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantizer.plans.plan import Plan
from tests.support.commands import bitwright, bitwright_json, run_options
from tests.support.mixtures import save_mixture
from tests.support.sampling import sampled


def run(family: str, folder: Path, *options: str) -> dict[str, Any]:
    model = save_mixture(family, folder / family, torch.bfloat16)
    report: dict[str, Any] = bitwright_json(
        *run_options(model, folder / "cache", folder / "out"), *options
    )
    return report


@pytest.mark.parametrize(
    "family", sampled(["qwen3_moe", "gpt_oss", "gpt2"], lambda family: family == "gpt_oss")
)
def test_a_run_delivers_a_checkpoint_that_generates(family: str, tmp_path: Path) -> None:
    report = run(family, tmp_path)
    assert report["plan_bytes"] <= report["budget_bytes"]
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")("The", return_tensors="pt")
    assert model.generate(**tokens, max_new_tokens=5, do_sample=False).shape[1] > 1


def test_starved_experts_are_named_and_an_engine_that_fuses_experts_gets_one_fidelity(
    tmp_path: Path,
) -> None:
    few = ("--calibration-windows", "1", "--tokens", "32")
    report = run("mixtral", tmp_path, *few, "--target", "vllm")
    (note,) = [note for note in report["notes"] if "experts saw fewer" in note]
    assert "model.layers." in note
    plan = Plan.loads((tmp_path / "out" / "plan.json").read_text(encoding="utf-8"))
    for block in range(2):
        found = {
            fidelity.name
            for name, fidelity in plan.by_name.items()
            if f"layers.{block}.mlp.experts" in name
        }
        assert len(found) == 1


@pytest.mark.parametrize("command", ["doctor", "dry run"])
def test_the_share_that_is_reached_is_said_before_any_work(command: str, tmp_path: Path) -> None:
    model = save_mixture("mixtral", tmp_path / "model")
    if command == "doctor":
        answer = bitwright_json("doctor", model)
    else:
        answer = bitwright_json("run", model, "--budget", "4bpw", "--dry-run")
    assert answer["class"] == "MixtralForCausalLM"
    assert answer["layers"] == sum(answer["layers_by_kind"].values()) == 32
    assert answer["reached_share"] == 0.9956
    assert answer["stays"][0]["kind"] == "mlp.gate.weight"
    assert answer["warning"] is None


def test_doctor_refuses_a_model_that_does_not_exist(tmp_path: Path) -> None:
    done = bitwright("doctor", tmp_path / "none")
    assert done.returncode == 2
    assert "none" in done.stderr


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (3, "stores 'model.layers.0.mlp.experts.down_proj' with shape (4, 64, 96), its config"),
        (10**9, "weights by its configuration, its files can hold at most"),
    ],
)
def test_a_configuration_with_another_number_of_experts_is_refused(
    experts: int, message: str, tmp_path: Path
) -> None:
    model = save_mixture("mixtral", tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"num_local_experts": experts}
    (model / "config.json").write_text(json.dumps(config))
    done = bitwright(*run_options(model, tmp_path / "cache", tmp_path / "out"))
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
