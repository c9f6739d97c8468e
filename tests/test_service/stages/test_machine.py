"""What decides the digits of a result is in the hash that it is stored under."""

import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from service.stages.machine import Machine
from tests.support.commands import bitwright_json, run_options
from tests.support.sampling import sampled

COMPUTED = {"candidates", "profile", "checkpoint", "evaluation"}
TOKENIZED = {"calibration"}
SOLVED = {"plan"}


def stages(cache: Path) -> set[Path]:
    return {path.parent.relative_to(cache) for path in cache.glob("*/*/manifest.json")}


def made_again(model: Path, cache: Path, out: Path) -> set[str]:
    """Return the names of the stages that a run makes though a like run has made its own."""
    before = stages(cache)
    bitwright_json(*run_options(model, cache, out))
    return {path.parent.name for path in stages(cache) - before}


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    yield
    torch.set_num_threads(before)


def test_the_same_machine_makes_nothing_again(
    tiny_llama: Path, warm_cache: Path, tmp_path: Path
) -> None:
    assert not made_again(tiny_llama, warm_cache, tmp_path / "out")


@pytest.mark.usefixtures("two_threads")
def test_another_number_of_threads_makes_what_is_computed_again(
    tiny_llama: Path, warm_cache: Path, tmp_path: Path
) -> None:
    made = made_again(tiny_llama, warm_cache, tmp_path / "out")
    assert made - SOLVED == COMPUTED  # a plan only if the profile has other digits
    assert not made_again(tiny_llama, warm_cache, tmp_path / "again")


@pytest.mark.parametrize(
    ("package", "decides"),
    sampled(
        [
            ("torch", COMPUTED | TOKENIZED),
            ("numpy", COMPUTED | SOLVED),
            ("tokenizers", TOKENIZED),
            ("osqp", SOLVED),
            ("fastapi", set()),
        ],
        lambda package, _: package != "torch",
    ),
)
def test_another_version_of_a_package_makes_what_it_decides_again(
    package: str,
    decides: set[str],
    tiny_llama: Path,
    warm_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed = importlib.metadata.version

    def other(name: str) -> str:
        return "0.0.1" if name == package else installed(name)

    monkeypatch.setattr(importlib.metadata, "version", other)
    assert made_again(tiny_llama, warm_cache, tmp_path / "out") == decides


def test_manifests_tell_what_a_stage_was_made_with(warm_cache: Path) -> None:
    (manifest,) = warm_cache.glob("candidates/*/manifest.json")
    machine = json.loads(manifest.read_text())["inputs"]["machine"]
    assert machine == Machine("cpu", torch.float32).inputs()
    assert machine["threads"] == torch.get_num_threads()
    assert set(machine["versions"]) == {"torch", "transformers", "numpy", "numba"}
    assert machine["versions"]["torch"] == torch.__version__
