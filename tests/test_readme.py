"""The commands of the README work as they are written."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import SMALL, bitwright, environment
from tests.support.paths import ROOT

README = (ROOT / "README.md").read_text()
LETTERS = (
    "A reader has a model and a size that it must fit, and text that the model will see. " * 400
)


def block(name: str) -> list[str]:
    """Return the commands between the markers of a block, without comments."""
    text = README.split(f"<!-- {name}: begin -->")[1].split(f"<!-- {name}: end -->")[0]
    lines = text.split("```sh\n")[1].split("```")[0].splitlines()
    return [line.partition("#")[0].strip() for line in lines]


@pytest.fixture(scope="module")
def folder(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and two texts, by the names that the README uses."""
    root = tmp_path_factory.mktemp("reader")
    shutil.copytree(tiny_llama, root / "MODEL")
    (root / "my.txt").write_text(LETTERS)
    (root / "other.txt").write_text(LETTERS[::-1])
    return root


def run(command: str, budgets: dict[str, str]) -> None:
    """Run a command of the README, with amounts and budgets of a tiny model."""
    program, verb, *arguments = shlex.split(command)
    assert program == "bitwright"
    small = {
        "run": [*SMALL, "--effort", "fast", "--evaluation-windows", "3"],
        "profile": SMALL[:8],
        "quantize": [*SMALL[:4], "--effort", "fast"],
        "evaluate": ["--tokens", "64", "--evaluation-windows", "3"],
    }
    given = [budgets.get(argument, argument) for argument in arguments]
    cache = [] if verb in ("plan", "frontier") else ["--cache", "cache"]
    done = bitwright(verb, *given, *small.get(verb, []), *cache)
    assert done.returncode == 0, f"{command}\n{done.stderr}"


@pytest.mark.parametrize(
    ("name", "budgets"),
    [
        ("own model", {"900MB": "103kB"}),
        ("what-ifs", {"2.5bpw": "4bpw", "2.6bpw": "4.2bpw", "0.7": "9"}),
    ],
)
def test_the_commands_of_a_block_work_one_after_the_other(
    name: str, budgets: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    commands = block(name)
    assert len(commands) >= 3
    for command in commands:
        run(command, budgets)


def test_the_python_of_the_readme_loads_a_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    if not (folder / "small").exists():
        for command in block("own model"):
            run(command, {"900MB": "103kB"})
    code = README.split("```python\n")[1].split("```")[0]
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint(type(model).__name__)"],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment() | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "LlamaForCausalLM"


@pytest.mark.parametrize("target", ["demo", "test", "test-long"])
def test_make_has_the_targets_that_the_readme_names(target: str) -> None:
    assert f"make {target}" in README
    subprocess.run(["make", "--dry-run", target], check=True, capture_output=True, cwd=ROOT)  # noqa: S607
