"""The whole path on the real demo model, out of its package.

The command line, and the newcomer's script of service/README.md.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from service.cli import demo
from tests.support.commands import PROGRAM, bitwright_json, environment
from tests.support.paths import ROOT


@dataclass(frozen=True)
class Demo:
    """One run of the command line on the demo model.

    Attributes:
        model: the GGUF file.
        cache: its finished stages.
        report: what it printed.
        expected: what the dry run said.
        peak_memory_bytes: as the system counted.
    """

    model: Path
    cache: Path
    report: dict[str, Any]
    expected: dict[str, Any]
    peak_memory_bytes: int


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Demo:
    """The run, made once for all processes of the test run.

    Who comes second waits, and finds it.
    """
    root = tmp_path_factory.getbasetemp()
    folder = (root if worker_id == "master" else root.parent) / "demo"
    with FileLock(f"{folder}.lock"):
        if not (folder / "found.json").is_file():
            folder.mkdir(exist_ok=True)
            (folder / "found.json").write_text(json.dumps(_run(folder)))
    found = json.loads((folder / "found.json").read_text())
    return Demo(
        Path(found["model"]),
        folder / "cache",
        found["report"],
        found["expected"],
        found["peak_memory_bytes"],
    )


def _run(folder: Path) -> dict[str, Any]:
    model = demo.fetch(Path(os.environ.get("BITWRIGHT_DEMO_MODEL", folder / "model")))
    arguments = (
        *(
            "run",
            str(model),
            "--budget",
            "2.5bpw",
            "--out",
            folder / "out",
            "--cache",
            folder / "cache",
        ),
        *("--tokens", "256", "--probe-windows", "8", "--guard-windows", "4"),
        *("--evaluation-windows", "8", "--effort", "fast", "--json"),
    )
    expected = bitwright_json(*arguments[:-1], "--dry-run")
    output = folder / "stdout"
    with output.open("wb") as file:
        process = subprocess.Popen([*PROGRAM, *map(str, arguments)], stdout=file, env=environment())
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(
        status
    )  # else it passes for running, as it was not waited for by itself
    assert process.returncode == 0
    report = json.loads(output.read_text())
    return {
        "model": str(model),
        "report": report,
        "expected": expected,
        "peak_memory_bytes": usage.ru_maxrss * 1024,
    }


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_smollm2_at_two_and_a_half_bits_keeps_its_promises(demo_run: Demo) -> None:
    """Exact bytes, predicted memory, and a plan clearly better than uniform on unseen text."""
    report = demo_run.report
    expected_bytes = demo_run.expected["peak_memory_bytes"]
    assert 0.5 * expected_bytes <= demo_run.peak_memory_bytes <= 1.2 * expected_bytes

    assert 0.995 * report["budget_bytes"] <= report["plan_bytes"] <= report["budget_bytes"]
    assert abs(report["uniform_bytes"] - report["plan_bytes"]) <= 0.001 * report["plan_bytes"]
    quality = report["evaluation"]
    assert quality["original"]["perplexity"] < quality["plan"]["perplexity"]
    assert (
        0
        < quality["plan"]["kl_nats_per_token"]
        < 0.9 * quality["uniform"]["kl_nats_per_token"]
        < 2.5
    )


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_newcomers_script_of_the_readme_works_as_written(
    demo_run: Demo, tmp_path: Path
) -> None:
    """It runs in an empty folder that has the environment and the model.

    Stages that the command line made are not made again.
    """
    readme = (ROOT / "service" / "README.md").read_text()
    script = readme.split("<!-- newcomer: begin -->")[1].split("```sh\n")[1].split("```")[0]
    (tmp_path / ".venv").symlink_to(sys.prefix)
    shutil.copytree(demo_run.model.parent, tmp_path / "demo" / "model")
    variables = {
        **environment(),
        "BITWRIGHT_DATA": str(tmp_path / "data"),
        "BITWRIGHT_CACHE": str(demo_run.cache),
    }
    command = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(
        command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    (answers,) = [
        json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"object":"list"')
    ]
    figures = [answer["allocation"] for answer in answers["data"]]
    assert [figure["weight_bytes"] <= figure["budget_bytes"] for figure in figures] == [True] * 3
    assert figures[2]["predicted_loss_nats_per_token"] <= 0.8
    assert "event: job.succeeded" in done.stdout
    (checkpoint,) = tmp_path.glob("job_*")
    plan = json.loads((checkpoint / "report.json").read_text())
    assert plan["evaluation"] == demo_run.report["evaluation"]
    assert "The capital of France is" in done.stdout
