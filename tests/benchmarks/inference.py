"""Measure a packed model against its original on a processor: seconds of generating and reading, and memory.

    python -m tests.benchmarks.inference PACKED ORIGINAL --label NAME

Both are folders. Speed: both models in one process, by turns; medians. Memory: each in a process of its own, its peak as the system
counts it, less that of a process that imports the same and loads nothing. Appends a row to results/inference.jsonl.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from quantizer.checkpoint import checkpoint_bytes
from tests.benchmarks.record import circumstances

RESULTS = Path(__file__).parent / "results" / "inference.jsonl"
NOTHING = "-"


def load(folder: str) -> Any:
    """Return a model in bfloat16, as a user would load it."""
    from transformers import AutoModelForCausalLM

    import quantizer  # noqa: F401  teaches transformers the format

    return AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16").eval()


def tokens_of(count: int) -> Any:
    """Return a prompt of that many tokens."""
    import torch

    return torch.arange(1, count + 1).unsqueeze(0) % 1000


def generate(model: Any, prompt: int, count: int) -> Any:
    """Return what a model continues a prompt with, greedily."""
    return model.generate(tokens_of(prompt), max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)


def seconds_of(work: Any) -> float:
    """Return what some work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def speed(packed: str, original: str, prompt: int, count: int, repeats: int) -> dict[str, Any]:
    """Return medians of seconds a generated token, and of seconds of reading a prompt."""
    import torch

    models = {"packed": load(packed), "original": load(original)}
    spent: dict[str, list[float]] = {f"{what}_{name}": [] for what in ("token", "prompt") for name in models}
    with torch.inference_mode():
        for turn in range(repeats + 1):
            for name, model in models.items():
                read = seconds_of(lambda model=model: model(tokens_of(prompt), logits_to_keep=1))
                token = seconds_of(lambda model=model: generate(model, 8, count)) / count
                if turn:  # the first warms up
                    spent[f"prompt_{name}"].append(read)
                    spent[f"token_{name}"].append(token)
    return {f"{name}_seconds": median(values) for name, values in spent.items()}


def peak_bytes(folder: str, prompt: int, count: int) -> int:
    """Return the peak memory of a process that loads a model, or `NOTHING`, and generates."""
    arguments = [sys.executable, "-m", "tests.benchmarks.inference", folder, NOTHING, "--label", NOTHING]
    process = subprocess.Popen([*arguments, "--alone", "--prompt", str(prompt), "--count", str(count)])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{folder} failed")
    return usage.ru_maxrss * 1024


def alone(folder: str, prompt: int, count: int) -> None:
    """Load and generate; or import all that this takes."""
    import torch

    if folder != NOTHING:
        with torch.inference_mode():
            generate(load(folder), prompt, count)
        return
    from transformers import AutoConfig, AutoModelForCausalLM

    from quantizer.kernels import cpu  # noqa: F401  what a packed model's first product imports

    sizes = {"vocab_size": 1000, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    generate(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes)), 1, 2)


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser()
    parser.add_argument("packed")
    parser.add_argument("original")
    parser.add_argument("--label", required=True)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        alone(arguments.packed, arguments.prompt, arguments.count)
        return
    prompt, count = arguments.prompt, arguments.count
    folders = {"packed": arguments.packed, "original": arguments.original}
    nothing = peak_bytes(NOTHING, prompt, count)
    row = {
        "label": arguments.label,
        "prompt_tokens": prompt,
        **{f"{name}_file_bytes": checkpoint_bytes(Path(folder)) for name, folder in folders.items()},
        **{f"{name}_memory_bytes": peak_bytes(folder, prompt, count) - nothing for name, folder in folders.items()},
        **speed(arguments.packed, arguments.original, prompt, count, arguments.repeats),
        "circumstances": circumstances(),
    }
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
