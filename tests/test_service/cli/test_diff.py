"""The command diff: two plans compared layer by layer, and priced by a profile."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from quantizer.plans.plan import Plan
from tests.support.commands import bitwright, bitwright_json
from tests.support.profile_commands import BUDGET, new_file, refused, store
from tests.support.synthetic_profiles import make_profile


@pytest.fixture
def two_plans(folder: Path) -> tuple[Path, Path]:
    """Plans of a small and of a large budget."""
    paths = new_file(folder), folder.parent / "large.json"
    for path, budget in zip(paths, ("2.6bpw", "3.6bpw"), strict=True):
        bitwright_json("plan", folder, "--budget", budget, "--out", path)
    return paths


def test_two_plan_files_are_compared_layer_by_layer(two_plans: tuple[Path, Path]) -> None:
    before, after = (Plan.loads(path.read_text()) for path in two_plans)
    found = bitwright_json("diff", *two_plans)
    differ = [name for name, fidelity in before.by_name.items() if after.by_name[name] != fidelity]
    assert len(differ) == found["changed"] > 0
    assert [change["layer"] for change in found["changes"]] == differ
    assert (
        found["bytes_more"]
        == after.weight_bytes - before.weight_bytes
        == sum(row["bytes_more"] for row in found["changes"])
    )
    assert "predicted_loss_more" not in found


def test_with_a_profile_a_difference_is_priced(folder: Path, two_plans: tuple[Path, Path]) -> None:
    found = bitwright_json("diff", *two_plans, "--profile", folder)
    losses = [json.loads(path.read_text())["predicted_loss_nats_per_token"] for path in two_plans]
    assert [found["predicted_loss_before"], found["predicted_loss_after"]] == pytest.approx(
        losses, abs=1e-9
    )
    assert found["predicted_loss_more"] == pytest.approx(losses[1] - losses[0], abs=1e-9)
    assert found["predicted_loss_more"] < 0


def test_a_difference_is_a_table_on_a_terminal(two_plans: tuple[Path, Path]) -> None:
    done = bitwright("diff", *two_plans)
    assert done.returncode == 0, done.stderr
    changes = bitwright_json("diff", *two_plans)["changes"]
    rows = [line for line in done.stdout.splitlines() if "model.layers." in line]
    assert len(rows) == len(changes)
    for row, change in zip(rows, changes, strict=True):
        assert change["layer"].rpartition(".")[0] in row
        assert f" {change['before']} " in row
        assert f" {change['after']} " in row
        assert f" {change['bytes_more']:+,} " in row
    assert f"changed: {len(changes)}" in done.stdout


def other_model(folder: Path) -> str:
    store(make_profile(0), folder / "other")
    bitwright_json("plan", folder / "other", "--budget", BUDGET, "--out", folder / "bad.json")
    return "different models"


def no_plan(folder: Path) -> str:
    (folder / "bad.json").write_text('{"schema": "something/1", "layers": {}}')
    return "schema"


def nothing(folder: Path) -> str:
    assert not (folder / "bad.json").exists()
    return "cannot be read"


@pytest.mark.parametrize("spoil", [other_model, no_plan, nothing])
def test_what_cannot_be_compared_is_bad_input(
    two_plans: tuple[Path, Path], tmp_path: Path, spoil: Callable[[Path], str]
) -> None:
    word = spoil(tmp_path)
    assert word in refused("diff", two_plans[0], tmp_path / "bad.json")
    assert word in refused("diff", tmp_path / "bad.json", two_plans[0])


def test_a_profile_of_another_model_does_not_price_a_difference(
    two_plans: tuple[Path, Path], tmp_path: Path
) -> None:
    other = store(make_profile(0), tmp_path / "other")
    assert "different models" in refused("diff", *two_plans, "--profile", other)
    assert "cannot be read" in refused("diff", *two_plans, "--profile", tmp_path / "nowhere")
