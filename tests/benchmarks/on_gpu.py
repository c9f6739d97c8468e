"""Run what waits for a GPU, the most important first, each step within its time.

For a GPU that is at hand for minutes.

    python -m tests.benchmarks.on_gpu OUT [--model MODEL --calibration TEXT --evaluation TEXT]
        [--steps kernels large ...]

OUT gets a log of each step, and the rows that it added to stored results. A real model is quantized
where it and texts are given. Where there is no git, the environment variable BITWRIGHT_COMMIT says
which commit this is.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.record import circumstances

RESULTS = Path(__file__).parent / "results"
SHOWN_LINES = 12


@dataclass(frozen=True)
class Step:
    """A program with its limit.

    Attributes:
        name: what it is called.
        seconds: after these it is stopped; what it had stored by then stays.
        arguments: of the interpreter.
        results: file of `RESULTS` that it appends to.
    """

    name: str
    seconds: int
    arguments: tuple[str, ...]
    results: str | None = None


def steps(
    model: str | None, calibration: str | None, evaluation: str | None, out: Path
) -> tuple[Step, ...]:
    """Return the steps in the order of their importance."""
    tests = (
        "-m",
        "pytest",
        "tests/test_quantizer/kernels/test_gpu_kernels.py",
        "--exitfirst",
        "--tb=short",
        "-k",
    )
    first = (Step("half", 80, (*tests, "half")), Step("packing", 60, (*tests, "values or no_rows")))
    large = Step("large", 150, ("-m", "tests.benchmarks.large"), "large.jsonl")
    kernels = (
        "-m",
        "tests.benchmarks.kernels",
        "--device",
        "cuda",
        "--models",
        "Llama 3 8B",
        "--seconds",
        "0.3",
    )
    last = Step("kernels", 240, kernels, "kernels.jsonl")
    if model is None or calibration is None or evaluation is None:
        return (*first, large, last)
    options = (
        "--calibration",
        calibration,
        "--evaluation",
        evaluation,
        "--cache",
        str(out / "cache"),
        "--device",
        "cuda",
    )
    levels = (
        "-m",
        "tests.benchmarks.quantizers",
        model,
        "--label",
        Path(model).name.split(".")[0],
        *options,
    )
    some = ("--budgets", "2.5", "--methods", "fast", "balanced", "best")
    return (*first, large, Step("levels", 400, (*levels, *some), "quantizers.jsonl"), last)


def take(step: Step, out: Path) -> bool:
    """Run a step, keep its output and results, and return whether it ended well in its time."""
    path = RESULTS / step.results if step.results else None
    known = _rows(path)
    start, log = time.monotonic(), out / f"{step.name}.log"
    with log.open("w") as file:
        command = [sys.executable, "-u", *step.arguments]
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(step.seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
            code = process.wait()
    print(f"== {step.name}: exit {code} after {time.monotonic() - start:.0f} s", flush=True)
    said = [
        line
        for line in log.read_text(errors="replace").replace("\r", "\n").splitlines()
        if line.strip()
    ]
    print(*said[-SHOWN_LINES:], sep="\n", flush=True)
    if path:
        (out / path.name).write_text("".join(_rows(path)[len(known) :]))
    return code == 0


def _rows(path: Path | None) -> list[str]:
    return path.read_text().splitlines(keepends=True) if path and path.exists() else []


def main() -> None:
    """Run the steps that are asked for, or all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--calibration")
    parser.add_argument("--evaluation")
    parser.add_argument("--steps", nargs="+")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    print(circumstances(), flush=True)
    wanted = steps(arguments.model, arguments.calibration, arguments.evaluation, arguments.out)
    unknown = set(arguments.steps or ()) - {step.name for step in wanted}
    if unknown:
        parser.error(
            f"no step {', '.join(sorted(unknown))}: use some of "
            f"{', '.join(step.name for step in wanted)}"
        )
    chosen = [step for step in wanted if arguments.steps is None or step.name in arguments.steps]
    ended_well = [take(step, arguments.out) for step in chosen]
    sys.exit(not all(ended_well))


if __name__ == "__main__":
    main()
