"""A budget in bytes counts the whole checkpoint, on the command line, over REST, in what-ifs."""

from pathlib import Path
from typing import Any

import pytest

from quantizer.conversion.checkpoint import checkpoint_bytes
from quantizer.plans.plan import Plan
from service.errors import RequestError
from service.request.options import RunOptions
from tests.support.commands import SMALL, bitwright, bitwright_json

TIGHT, ROOMY = 72_000, 103_000
"""Bytes of a checkpoint that embedding and head fit quantized only, and as they are."""


def profile(model: Path, folder: Path, budget: str) -> tuple[Path, Any]:
    """Measure a profile; return its folder and the summary of the command."""
    out = folder / "profile"
    summary = bitwright_json(
        "profile", model, "--budget", budget, "--out", out, "--cache", folder / "cache", *SMALL[:8]
    )
    return out, summary


@pytest.mark.parametrize(("size", "quantizes_embeddings"), [(ROOMY, False), (TIGHT, True)])
def test_a_plan_for_a_checkpoint_makes_one_of_that_size(
    size: int, quantizes_embeddings: bool, tiny_llama: Path, tmp_path: Path
) -> None:
    folder, summary = profile(tiny_llama, tmp_path, f"{size}B")
    assert summary["unquantized_bytes"] > 0
    plan = tmp_path / "plan.json"
    answer = bitwright_json("plan", folder, "--budget", f"{size}B", "--out", plan)
    assert answer["checkpoint_bytes"] <= size
    assert bool(answer["embedding_fidelities"]) == quantizes_embeddings
    assert bool(Plan.loads(plan.read_text()).embeddings) == quantizes_embeddings
    out = tmp_path / "out"
    bitwright_json(
        *("quantize", tiny_llama, "--plan", plan, "--out", out, "--effort", "fast"),
        *("--cache", tmp_path / "cache", *SMALL[:4]),
    )
    assert checkpoint_bytes(out) <= answer["checkpoint_bytes"]
    check = bitwright_json("plan", folder, "--check", plan, "--budget", f"{size}B")
    assert not check["broken_limits"]


def test_layers_can_be_budgeted_alone(tiny_llama: Path, tmp_path: Path) -> None:
    folder, summary = profile(tiny_llama, tmp_path, "4bpw")
    wanted = sum(summary["budget_range_bytes"]) // 2
    by_layers = bitwright_json(
        *("plan", folder, "--budget", f"{wanted}B", "--budget-of", "layers"),
        *("--out", tmp_path / "a.json"),
    )
    whole = wanted + summary["unquantized_bytes"]
    by_checkpoint = bitwright_json(
        "plan", folder, "--budget", f"{whole}B", "--out", tmp_path / "b.json"
    )
    assert by_layers["budget_bytes"] == by_checkpoint["budget_bytes"] == wanted
    assert by_layers["layers"] == by_checkpoint["layers"]
    low, high = wanted + summary["unquantized_bytes"] - 2_000, whole
    points = bitwright_json(
        *("frontier", folder, "--points", "3", "--from", f"{low}B", "--to", f"{high}B")
    )["points"]
    assert [point["budget_bytes"] for point in points] == [wanted - 2_000, wanted - 1_000, wanted]
    assert all(
        point["checkpoint_bytes"] == point["weight_bytes"] + summary["unquantized_bytes"]
        for point in points
    )


def test_too_small_a_checkpoint_is_refused_with_the_smallest_one(
    tiny_llama: Path, tmp_path: Path
) -> None:
    folder, _ = profile(tiny_llama, tmp_path, "4bpw")
    done = bitwright("plan", folder, "--budget", "10kB", "--out", tmp_path / "plan.json")
    assert done.returncode == 3
    assert "whole checkpoint" in done.stderr
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"budget": "900MB"}, "checkpoint"),
        ({"budget": "2.5bpw"}, "layers"),
        ({"budget": "900MB", "budget_of": "layers"}, "layers"),
        ({"budget": "900MB", "whole_file": True}, "checkpoint"),
        ({"budget": "900MB", "whole_file": False}, "layers"),
        ({"budget": "900MB", "whole_file": False, "budget_of": "checkpoint"}, "checkpoint"),
    ],
)
def test_jobs_of_earlier_versions_keep_their_meaning(
    options: dict[str, Any], expected: str
) -> None:
    request = RunOptions.model_validate({"model": "m", **options}).to_request()
    assert request.budget_of == expected


def test_embeddings_join_a_checkpoint_only() -> None:
    options = RunOptions(model="m", budget="2.5bpw", embeddings="join")
    with pytest.raises(RequestError, match="whole checkpoint"):
        options.to_request()
