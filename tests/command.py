"""Run the command line as a user would: in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SMALL = [
    *("--calibration-windows", "4"),
    *("--tokens", "64"),
    *("--probe-windows", "3"),
    *("--probe-tokens", "32"),
]
"""Options that make a tiny model's run take seconds."""

_PROGRAM = [sys.executable, "-c", "from service.cli import entry; entry()"]


def bitwright(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `bitwright` with the arguments and return its exit code, stdout and stderr."""
    return subprocess.run(
        [*_PROGRAM, *map(str, arguments)], capture_output=True, text=True, check=False, env=_environment(environment)
    )


def bitwright_json(*arguments: str | Path) -> Any:
    """Run `bitwright ... --json`, which must succeed, and return its document."""
    done = bitwright(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def run_options(model: Path, cache: Path, out: Path, budget: str = "4bpw") -> list[str]:
    """Return the arguments of a small `bitwright run`."""
    return ["run", str(model), "--budget", budget, "--out", str(out), "--cache", str(cache), "--evaluation-windows", "3", *SMALL]


def stop_when(arguments: list[str], condition: Callable[[], bool], how: signal.Signals) -> subprocess.CompletedProcess[str]:
    """Start `bitwright`, send it a signal as soon as the condition holds, and return how it ended.

    Raises:
        AssertionError: it ended before the condition held.
    """
    process = subprocess.Popen(
        [*_PROGRAM, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment({})
    )
    while not condition():
        assert process.poll() is None, f"ended before it could be stopped: {process.communicate()[1]}"
        time.sleep(0.002)
    process.send_signal(how)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def _environment(extra: dict[str, str]) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "OMP_NUM_THREADS": "1", **extra}
