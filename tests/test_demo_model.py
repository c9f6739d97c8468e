"""The whole path on the real demo model, out of its package: one slower test."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from service import demo
from tests.command import PROGRAM


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_smollm2_at_two_and_a_half_bits_keeps_its_promises(tmp_path: Path) -> None:
    """Exact bytes, and measured quality; the effort is too small for the plan to be sure to beat the uniform one."""
    model = demo.fetch(Path(os.environ.get("BITWRIGHT_DEMO_MODEL", tmp_path / "model")))
    arguments = (
        *("run", str(model), "--budget", "2.5bpw", "--out", tmp_path / "out", "--cache", tmp_path / "cache"),
        *("--calibration-windows", "4", "--tokens", "256", "--probe-windows", "4", "--probe-tokens", "48"),
        *("--evaluation-windows", "8", "--json"),
    )
    done = subprocess.run([*PROGRAM, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)

    assert 0.995 * report["budget_bytes"] <= report["plan_bytes"] <= report["budget_bytes"]
    assert abs(report["uniform_bytes"] - report["plan_bytes"]) <= 0.001 * report["plan_bytes"]
    quality = report["evaluation"]
    assert quality["original"]["perplexity"] < quality["plan"]["perplexity"]
    assert 0 < quality["plan"]["kl_nats_per_token"] < 2.5
    assert 0 < quality["uniform"]["kl_nats_per_token"] < 2.5
