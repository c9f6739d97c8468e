"""Measure a packed model against its original on a processor.

Seconds of generating and reading, and memory.

    python -m tests.benchmarks.inference PACKED ORIGINAL --label NAME

Both are folders. Speed: both models in bfloat16 in one process, by turns; medians. Memory: each
model in the dtype it is stored in, in a process of its own, whose peaks are read from outside after
loading and at the end, less those of a process that runs the same code on next to nothing. Greedy
continuations of real text, in float32, are compared with those of the reference. Appends a row to
results/inference.jsonl.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median
from typing import Any
from unittest.mock import patch

from quantizer.conversion.checkpoint import checkpoint_bytes
from quantizer.kernels.path import KERNELS_VARIABLE, REFERENCE
from tests.benchmarks.record import circumstances

RESULTS = Path(__file__).parent / "results" / "inference.jsonl"
NOTHING = "-"


def load(folder: str, dtype: str) -> Any:
    """Return a model as a user would load it."""
    from transformers import AutoModelForCausalLM

    import quantizer  # noqa: F401  teaches transformers the format

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def tokens_of(count: int) -> Any:
    """Return a prompt of that many tokens."""
    import torch

    return torch.arange(1, count + 1).unsqueeze(0) % 1000


def generate(model: Any, prompt: int, count: int) -> Any:
    """Return what a model continues a prompt with, greedily."""
    return model.generate(
        tokens_of(prompt),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )


def seconds_of(work: Any) -> float:
    """Return what some work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def speed(packed: str, original: str, prompt: int, count: int, repeats: int) -> dict[str, Any]:
    """Return medians of seconds a generated token, and of seconds of reading a prompt."""
    import torch

    models = {"packed": load(packed, "bfloat16"), "original": load(original, "bfloat16")}
    spent: dict[str, list[float]] = {
        f"{what}_{name}": [] for what in ("token", "prompt") for name in models
    }
    with torch.inference_mode():
        for turn in range(repeats + 1):
            for name, model in models.items():
                read = seconds_of(lambda model=model: model(tokens_of(prompt), logits_to_keep=1))
                token = seconds_of(lambda model=model: generate(model, 8, count)) / count
                if turn:  # the first warms up
                    spent[f"prompt_{name}"].append(read)
                    spent[f"token_{name}"].append(token)
    return {f"{name}_seconds": median(values) for name, values in spent.items()}


def agreement(packed: str, count: int) -> dict[str, int]:
    """Return how many tokens greedy continuations have, and how many agree with the reference.

    Tokens count up to the first difference.
    """
    import torch
    from transformers import AutoTokenizer

    model, tokenizer = load(packed, "float32"), AutoTokenizer.from_pretrained(packed)
    texts = [topics[name] for name in sorted(topics)[:: len(topics) // 4][:4]]
    prompts = torch.tensor([tokenizer(text)["input_ids"][:16] for text in texts])
    found = []
    for setting in ("auto", REFERENCE):
        with patch.dict(os.environ, {KERNELS_VARIABLE: setting}):
            given = {
                "attention_mask": torch.ones_like(prompts),
                "max_new_tokens": count,
                "min_new_tokens": count,
            }
            found.append(model.generate(prompts, **given, do_sample=False, pad_token_id=0)[:, 16:])
    same = (found[0] == found[1]).cumprod(1)
    return {"greedy_tokens": same.numel(), "greedy_tokens_of_reference": int(same.sum())}


def peak_bytes(folder: str, prompt: int, count: int) -> dict[str, int]:
    """Return the peak memory of a process that loaded a model, or `NOTHING`, and generated."""
    arguments = [
        sys.executable,
        "-m",
        "tests.benchmarks.inference",
        folder,
        NOTHING,
        "--label",
        NOTHING,
    ]
    command = [*arguments, "--alone", "--prompt", str(prompt), "--count", str(count)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        peaks = {}
        for moment in ("loading", "generating"):
            if process.stdout.readline().strip() != moment:
                raise SystemExit(f"{folder} failed")
            said = dict(
                line.split(":", 1)
                for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()
            )
            peaks[moment] = int(said["VmHWM"].split()[0]) * 1024
            print(file=process.stdin, flush=True)
    return peaks


def alone(folder: str, prompt: int, count: int) -> None:
    """Load and generate, waiting for a line after each.

    Or run what this runs, on next to nothing.
    """
    import torch

    with torch.inference_mode():
        run_code()
        model = None if folder == NOTHING else load(folder, "auto")
        for moment in ("loading", "generating"):
            if moment == "generating" and model is not None:
                generate(model, prompt, count)
            print(moment, flush=True)
            input()


def run_code() -> None:
    """Bring the code of models and kernels into memory, compiled where that is at run time."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from quantizer.modules.matmul_cpu import FEW_ROWS, PackedLayer
    from quantizer.plans.fidelity import Fidelity
    from tests.benchmarks.kernels import random_layer

    sizes = {
        "vocab_size": 1000,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    generate(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes)), 16, 2)
    fidelity = Fidelity.parse("int2+3r0.4g32s6")
    layer = PackedLayer.of(random_layer(fidelity, (32, 64), "cpu"), fidelity, 64)
    for rows in (1, FEW_ROWS):
        layer.multiply(torch.ones(rows, 64), 32)
    for dtype in (torch.float32, torch.bfloat16):
        layer.dequantize_tile(torch.empty(64, 32, dtype=dtype), 0)


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
    peaks = {name: peak_bytes(folder, prompt, count) for name, folder in folders.items()}
    row = {
        "label": arguments.label,
        "prompt_tokens": prompt,
        **{
            f"{name}_file_bytes": checkpoint_bytes(Path(folder)) for name, folder in folders.items()
        },
        **{
            f"{name}_{moment}_bytes": peaks[name][moment] - nothing[moment]
            for name in folders
            for moment in nothing
        },
        **agreement(arguments.packed, 2 * count),
        **speed(arguments.packed, arguments.original, prompt, count, arguments.repeats),
        "circumstances": circumstances(),
    }
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
