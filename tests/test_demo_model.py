"""The whole path on the real demo model, out of its package: one slower test."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from service import demo
from tests.command import PROGRAM, bitwright_json, environment


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_smollm2_at_two_and_a_half_bits_keeps_its_promises(tmp_path: Path) -> None:
    """Exact bytes, foreseen memory, and a plan that is clearly better than the uniform one on text that neither was made with."""
    model = demo.fetch(Path(os.environ.get("BITWRIGHT_DEMO_MODEL", tmp_path / "model")))
    arguments = (
        *("run", str(model), "--budget", "2.5bpw", "--out", tmp_path / "out", "--cache", tmp_path / "cache"),
        *("--calibration-windows", "4", "--tokens", "256", "--probe-windows", "4", "--guard-windows", "4"),
        *("--evaluation-windows", "8", "--json"),
    )
    expected = bitwright_json(*arguments[:-1], "--dry-run")
    output = tmp_path / "stdout"
    with output.open("wb") as file:
        process = subprocess.Popen([*PROGRAM, *map(str, arguments)], stdout=file, env=environment())
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # else it passes for running, as it was not waited for by itself
    assert process.returncode == 0
    report = json.loads(output.read_text())
    peak_memory_bytes = usage.ru_maxrss * 1024
    assert 0.5 * expected["peak_memory_bytes"] <= peak_memory_bytes <= 1.2 * expected["peak_memory_bytes"]

    assert 0.995 * report["budget_bytes"] <= report["plan_bytes"] <= report["budget_bytes"]
    assert abs(report["uniform_bytes"] - report["plan_bytes"]) <= 0.001 * report["plan_bytes"]
    quality = report["evaluation"]
    assert quality["original"]["perplexity"] < quality["plan"]["perplexity"]
    assert 0 < quality["plan"]["kl_nats_per_token"] < 0.9 * quality["uniform"]["kl_nats_per_token"] < 2.5
