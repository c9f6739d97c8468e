"""Measure products with packed weights against bfloat16 ones, at the shapes of Llama's layers.

    python -m tests.benchmarks.kernels [--device cuda] [--models "Llama 3 8B" ...] [--rows 1 4 ...]

Both ways by turns in one process; medians. Codes are random: speed does not depend on them. Appends a row for each shape, fidelity
and number of rows to results/kernels.jsonl.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from quantizer.fidelity import Fidelity
from quantizer.kernels.dispatch import choose_path, matmul
from quantizer.kernels.kept import Kept
from quantizer.weight import COLUMNS, tensor_specs
from tests.benchmarks.record import circumstances

RESULTS = Path(__file__).parent / "results" / "kernels.jsonl"
SHAPES = {
    "Llama 3 8B": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
    "Llama 3 70B": ((8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)),
}
FIDELITIES = ("int2+3r0.375g64s6", "int2+3r0.0625g128s6", "int3g64s6", "int4g64s6")
PATIENCE = 20.0
"""Seconds for each pair of ways, at least three turns of each."""


def random_layer(fidelity: Fidelity, shape: tuple[int, int], device: str) -> dict[str, Tensor]:
    """Return stored tensors of random numbers."""
    tensors = {}
    for name, spec in tensor_specs(fidelity, *shape).items():
        if name == COLUMNS:
            tensors[name] = torch.randperm(shape[1]).to(spec.dtype)
        elif spec.dtype == torch.float16:
            tensors[name] = torch.rand(spec.shape).add(0.1).div(100).half()
        else:
            tensors[name] = torch.randint(-(2**31), 2**31, spec.shape, dtype=torch.int64).to(spec.dtype)
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def seconds_of(work: Callable[[], Any], device: str) -> float:
    """Return what some work takes, until its results are there."""
    start = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(ways: dict[str, Callable[[], Any]], device: str) -> dict[str, float]:
    """Return the median of seconds of each way, by turns."""
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for work in ways.values():
        seconds_of(work, device)
    start = time.perf_counter()
    while len(spent["packed"]) < 3 or (time.perf_counter() - start < PATIENCE and len(spent["packed"]) < 200):
        for name, work in ways.items():
            spent[name].append(seconds_of(work, device))
    return {f"{name}_seconds": median(values) for name, values in spent.items()}


def measure(name: str, shape: tuple[int, int], rows: int, device: str) -> dict[str, Any]:
    """Return the row of a fidelity, a shape and a number of rows."""
    fidelity, kept = Fidelity.parse(name), Kept()
    tensors = random_layer(fidelity, shape, device)
    weight, x = (
        torch.randn(shape, dtype=torch.bfloat16, device=device),
        torch.randn(rows, shape[1], dtype=torch.bfloat16, device=device),
    )
    ways: dict[str, Callable[[], Any]] = {
        "packed": lambda: matmul(x, tensors, fidelity, shape[0], kept=kept),
        "bfloat16": lambda: torch.nn.functional.linear(x, weight),
    }
    size = fidelity.weight_bytes(*shape)
    with torch.inference_mode():
        found = compare(ways, device)
    return {"fidelity": name, "shape": shape, "rows": rows, "bits_per_weight": 8 * size / (shape[0] * shape[1]), **found}


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--fidelities", nargs="+", default=list(FIDELITIES))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 256, 4096])
    arguments = parser.parse_args()
    device = arguments.device
    hardware = torch.cuda.get_device_name() if device != "cpu" else None
    for model in arguments.models:
        for shape in SHAPES[model]:
            for fidelity in arguments.fidelities:
                for rows in arguments.rows:
                    row = measure(fidelity, shape, rows, device)
                    row |= {"model": model, "path": choose_path(device).name, "gpu": hardware, "torch": torch.__version__}
                    with RESULTS.open("a") as file:
                        file.write(json.dumps(row | {"circumstances": circumstances()}) + "\n")
                    ratio = row["bfloat16_seconds"] / row["packed_seconds"]
                    print(
                        f"{model} {shape} {fidelity} {rows} rows: {row['packed_seconds'] * 1e3:.2f} ms, x {ratio:.2f}", flush=True
                    )


if __name__ == "__main__":
    main()
