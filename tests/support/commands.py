"""Run the command line as a user would.

In this process, or in one of its own where it is to be killed.
"""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.cli.main import main

SMALL = [
    *("--calibration-windows", "4"),
    *("--tokens", "64"),
    *("--probe-windows", "3"),
    *("--probe-tokens", "32"),
    *("--guard-windows", "2"),
]
"""Options that make a tiny model's run take seconds."""

PROGRAM = [sys.executable, "-c", "from service.cli.main import entry; entry()"]


def bitwright(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `bitwright` with the arguments and return its exit code, stdout and stderr.

    Bugs are raised.
    """
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([*map(str, arguments)])
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def bitwright_json(*arguments: str | Path) -> Any:
    """Run `bitwright ... --json`, which must succeed, and return its document."""
    done = bitwright(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def run_options(model: Path, cache: Path, out: Path, budget: str = "4bpw") -> list[str]:
    """Return the arguments of a small `bitwright run`."""
    folders = ["--out", str(out), "--cache", str(cache)]
    return [
        "run",
        str(model),
        "--budget",
        budget,
        *folders,
        "--effort",
        "fast",
        "--evaluation-windows",
        "3",
        *SMALL,
    ]


@dataclass(frozen=True)
class SmallRun:
    """A finished `bitwright run` of the tiny llama; no test writes to its folders.

    Attributes:
        cache: all finished stages.
        out: the delivered files.
        report: what the command printed.
    """

    cache: Path
    out: Path
    report: dict[str, Any]


def heed_interrupts() -> None:
    """Undo that a shell lets its background jobs ignore interrupts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


class EndedTooSoon(AssertionError):
    """A process ended before it could be stopped, as on a busy machine it may."""


def stop_when(
    arguments: list[str], condition: Callable[[], bool], how: signal.Signals
) -> subprocess.CompletedProcess[str]:
    """Start `bitwright`, send it a signal as soon as the condition holds, and return how it ended.

    Raises:
        EndedTooSoon: it ended before the condition was seen to hold.
    """
    process = subprocess.Popen(
        [*PROGRAM, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        preexec_fn=heed_interrupts,  # noqa: PLW1509  no thread runs yet
    )
    while not condition():
        if process.poll() is not None:
            raise EndedTooSoon(process.communicate()[1])
        time.sleep(0.002)
    process.send_signal(how)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def environment() -> dict[str, str]:
    """Return the environment of a process that runs a tiny model.

    Off the network, on one thread.
    """
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
