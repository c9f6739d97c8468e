"""Quantized embeddings and heads.

They are quantized where a budget of the whole file cannot be met otherwise, and only there.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantizer.conversion.checkpoint import checkpoint_bytes, quantized_bytes
from quantizer.conversion.embeddings import EMBEDDING_FIDELITIES
from quantizer.modules.embedding import QuantizedEmbedding
from quantizer.plans.plan import Plan
from tests.support.commands import SMALL, bitwright, bitwright_json, run_options

TIGHT, ROOMY = "72kB", "103kB"
"""Budgets of the whole checkpoint.

One that the model's 16-bit table alone nearly takes, and one that it fits.
"""


def _run(model: Path, cache: Path, folder: Path, budget: str, *more: str) -> Any:
    return bitwright_json(*run_options(model, cache, folder / "out", budget), *more)


def test_embeddings_join_where_the_file_would_not_fit_otherwise(
    tiny_llama: Path, tmp_path: Path, module_cache: Path
) -> None:
    refused = bitwright(
        *run_options(tiny_llama, tmp_path / "c", tmp_path / "o", TIGHT),
        "--embeddings",
        "keep",
    )
    assert refused.returncode == 3

    expected = _run(tiny_llama, module_cache, tmp_path, TIGHT, "--dry-run")
    assert expected["tables"] == ["model.embed_tokens"]
    report = _run(tiny_llama, module_cache, tmp_path, TIGHT)
    (table,) = report["tables"].values()
    assert table["kind"] == "embedding and head"
    assert table["fidelity"] in {option.name for option in EMBEDDING_FIDELITIES}
    plan = Plan.loads((tmp_path / "out" / "plan.json").read_text())
    assert (
        plan.weight_bytes
        == report["plan_bytes"] + table["weight_bytes"]
        == quantized_bytes(tmp_path / "out", plan)
    )
    assert report["checkpoint_bytes"] == checkpoint_bytes(tmp_path / "out") <= 72_000
    assert report["unquantized_bytes"] == report["checkpoint_bytes"] - plan.weight_bytes
    assert abs(report["uniform_bytes"] - report["plan_bytes"]) <= 0.03 * report["plan_bytes"]
    assert any(
        "embedding and head (model.embed_tokens) is stored at" in note for note in report["notes"]
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert isinstance(model.get_input_embeddings(), QuantizedEmbedding)


def test_embeddings_stay_where_the_file_fits(
    tiny_llama: Path, tmp_path: Path, module_cache: Path
) -> None:
    report = _run(tiny_llama, module_cache, tmp_path, ROOMY)
    assert report["tables"] == {}
    assert Plan.loads((tmp_path / "out" / "plan.json").read_text()).embeddings == {}


def test_embeddings_that_join_leave_more_to_the_layers(
    tiny_llama: Path, tmp_path: Path, module_cache: Path
) -> None:
    kept, joined = (
        _run(tiny_llama, module_cache, tmp_path, ROOMY),
        _run(tiny_llama, module_cache, tmp_path / "other", ROOMY, "--embeddings", "join"),
    )
    assert joined["checkpoint_bytes"] <= 103_000
    if joined["tables"]:
        assert joined["plan_bytes"] > kept["plan_bytes"]
    assert (
        joined["evaluation"]["plan"]["kl_nats_per_token"]
        < 1.1 * kept["evaluation"]["plan"]["kl_nats_per_token"]
    )


def test_plans_with_tables_are_carried_out_trained_compared_and_priced(
    tiny_llama: Path, tmp_path: Path, module_cache: Path
) -> None:
    _run(tiny_llama, module_cache, tmp_path, TIGHT)
    plan = tmp_path / "out" / "plan.json"
    options = ("--plan", plan, "--cache", module_cache, *SMALL[:4])
    made = bitwright_json(
        "quantize", tiny_llama, "--out", tmp_path / "again", "--effort", "fast", *options
    )
    assert made["plan_bytes"] == Plan.loads(plan.read_text()).weight_bytes
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert weights[0] == weights[1]
    trained = bitwright_json(
        "quantize", tiny_llama, "--out", tmp_path / "trained", "--effort", "balanced", *options
    )
    assert trained["plan_bytes"] == made["plan_bytes"]
    folders = [tmp_path / name for name in ("out", "trained")]
    scores = bitwright_json(
        "evaluate", tiny_llama, *folders, "--tokens", "64", "--cache", module_cache
    )
    before, after = (scores[str(folder)]["kl_nats_per_token"] for folder in folders)
    assert after < before

    profile = tmp_path / "profile"
    bitwright_json(
        "profile",
        tiny_llama,
        "--budget",
        "4bpw",
        "--out",
        profile,
        "--cache",
        module_cache,
        *SMALL[:8],
    )
    assert (
        bitwright_json("plan", profile, "--check", plan)["weight_bytes"]
        == Plan.loads(plan.read_text()).without_embeddings.weight_bytes
    )
    assert bitwright("diff", str(plan), str(plan)).returncode == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--embeddings", "sideways"),
            "embeddings 'sideways': give auto, keep or join",
        ),
        (("--embeddings", "join", "--budget-of", "layers"), "give the budget in bytes"),
    ],
)
def test_what_embeddings_cannot_be(
    options: tuple[str, ...], message: str, tiny_llama: Path, tmp_path: Path
) -> None:
    done = bitwright(
        *run_options(tiny_llama, tmp_path / "cache", tmp_path / "out", ROOMY), *options
    )
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())


def test_a_file_that_not_even_small_tables_fit_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    for budget, message in (
        ("60kB", "is below the smallest plan"),
        ("25kB", "is left for the layers"),
    ):
        done = bitwright(*run_options(tiny_llama, tmp_path / "cache", tmp_path / "out", budget))
        assert done.returncode == 3
        assert message in " ".join(done.stderr.split())
