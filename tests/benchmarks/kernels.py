"""Measure products with packed weights against bfloat16 ones, at the shapes of Llama's layers.

    python -m tests.benchmarks.kernels [--device cuda] [--models "Llama 3 8B" ...] [--rows 1 4 ...]
        [--seconds 20]

Both ways by turns in one process; medians of as many turns as the seconds allow, one at least,
after one to warm up. Codes are random: speed does not depend on them. Appends a row for each shape,
fidelity and number of rows to results/kernels.jsonl, with the bandwidth of copying memory. On a
GPU, where weights are cold in its cache at each turn and only its own time counts, expanding
weights at each call and both ways of multiplying many rows are timed as well and, once `pip install
gemlite` was said, GemLite on the formats that both have.
"""

import argparse
import json
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from quantizer.kernels.path import choose_kernel_path
from quantizer.modules.matmul import matmul
from quantizer.modules.tensor_cache import TensorCache
from quantizer.packed.layout import COLUMNS, tensor_specs
from quantizer.plans.fidelity import Fidelity
from tests.benchmarks.record import circumstances

RESULTS = Path(__file__).parent / "results" / "kernels.jsonl"
SHAPES = {
    "Llama 3 8B": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
    "Llama 3 70B": ((8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)),
}
FIDELITIES = ("int2+3r0.375g64s6", "int2+3r0.0625g128s6", "int3g64s6", "int4g64s6")

SHARED = ("int2g64", "int4g64")
"""Formats that GemLite has as well; measured on a GPU."""


def random_layer(fidelity: Fidelity, shape: tuple[int, int], device: str) -> dict[str, Tensor]:
    """Return stored tensors of random numbers."""
    tensors = {}
    for name, spec in tensor_specs(fidelity, *shape).items():
        if name == COLUMNS:
            tensors[name] = torch.randperm(shape[1]).to(spec.dtype)
        elif spec.dtype == torch.float16:
            tensors[name] = torch.rand(spec.shape).add(0.1).div(100).half()
        else:
            tensors[name] = torch.randint(-(2**31), 2**31, spec.shape, dtype=torch.int64).to(
                spec.dtype
            )
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def gemlite_layer(
    fidelity: Fidelity, shape: tuple[int, int], device: str
) -> Callable[[Tensor], Tensor]:
    """Return a layer of GemLite's with random codes, scales and zero points of the same sizes."""
    from gemlite import DType, GemLiteLinear

    bits, (out_features, in_features) = fidelity.bits_lo, shape
    layer = GemLiteLinear(
        bits, fidelity.group_size, in_features, out_features, DType.BF16, DType.BF16
    )
    codes = torch.randint(2**bits, shape, dtype=torch.uint8, device=device)
    scales = torch.rand(
        out_features, in_features // fidelity.group_size, dtype=torch.bfloat16, device=device
    )
    layer.pack(codes, scales, torch.full_like(scales, 2 ** (bits - 1)), None)
    return layer


def seconds_of(work: Callable[[], Any], device: str) -> float:
    """Return what some work takes, until its results are there."""
    start = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(ways: dict[str, Callable[[], Any]], device: str, patience_s: float) -> dict[str, float]:
    """Return the median of seconds of each way and, where they took turns, how many."""
    if device != "cpu":
        from triton.testing import do_bench

        some_ms = patience_s * 1e3 / len(ways)
        return {
            f"{name}_seconds": do_bench(work, some_ms / 4, some_ms, return_mode="median") / 1e3
            for name, work in ways.items()
        }
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for work in ways.values():
        seconds_of(work, device)
    start = time.perf_counter()
    while not spent["packed"] or (
        time.perf_counter() - start < patience_s and len(spent["packed"]) < 200
    ):
        for name, work in ways.items():
            spent[name].append(seconds_of(work, device))
    return {f"{name}_seconds": median(values) for name, values in spent.items()} | {
        "turns": len(spent["packed"])
    }


def measure(
    name: str, shape: tuple[int, int], rows: int, device: str, patience_s: float
) -> dict[str, Any]:
    """Return the row of a fidelity, a shape and a number of rows."""
    fidelity, cache = Fidelity.parse(name), TensorCache()
    tensors = random_layer(fidelity, shape, device)
    weight, x = (
        torch.randn(shape, dtype=torch.bfloat16, device=device),
        torch.randn(rows, shape[1], dtype=torch.bfloat16, device=device),
    )
    ways: dict[str, Callable[[], Any]] = {
        "packed": lambda: matmul(x, tensors, fidelity, shape[0], cache=cache),
        "bfloat16": lambda: torch.nn.functional.linear(x, weight),
    }
    if device != "cpu":
        from quantizer.modules import matmul_gpu, matmul_reference

        ways["reference"] = lambda: matmul_reference.matmul(x, tensors, fidelity, shape[0], None)
        ways["fused"] = lambda: matmul_gpu.multiply_fused(x, tensors, fidelity, shape[0])
        ways["tiles"] = lambda: matmul_gpu.multiply_tiles(x, tensors, fidelity, shape[0])
    if device != "cpu" and name in SHARED and find_spec("gemlite"):
        theirs = gemlite_layer(fidelity, shape, device)
        ways["gemlite"] = lambda: theirs(x)
    size = fidelity.weight_bytes(*shape)
    with torch.inference_mode():
        found = compare(ways, device, patience_s)
    return {"fidelity": name, "shape": shape, "rows": rows, "packed_bytes": size, **found}


def copy_bandwidth(device: str) -> float:
    """Return bytes a second, read and written, of copying memory that fits no cache.

    Median of 9 times.
    """
    source = torch.ones(2**28, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return (
        2 * len(source) / median(seconds_of(lambda: target.copy_(source), device) for _ in range(9))
    )


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument(
        "--fidelities",
        nargs="+",
        help=f"default: {' '.join(FIDELITIES)}; on a GPU also {' '.join(SHARED)}",
    )
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 256, 4096])
    parser.add_argument("--seconds", type=float, default=20.0)
    arguments = parser.parse_args()
    device = arguments.device
    fidelities = arguments.fidelities or (FIDELITIES if device == "cpu" else (*FIDELITIES, *SHARED))
    machine = {
        "path": choose_kernel_path(device).name,
        "gpu": torch.cuda.get_device_name() if device != "cpu" else None,
        "copy_bytes_per_second": copy_bandwidth(device),
        "torch": torch.__version__,
    }
    for model in arguments.models:
        for shape in SHAPES[model]:
            for fidelity in fidelities:
                for rows in arguments.rows:
                    row = measure(fidelity, shape, rows, device, arguments.seconds)
                    row |= {"model": model, **machine}
                    with RESULTS.open("a") as file:
                        file.write(json.dumps(row | {"circumstances": circumstances()}) + "\n")
                    ratio = row["bfloat16_seconds"] / row["packed_seconds"]
                    print(
                        f"{model} {shape} {fidelity} {rows} rows: "
                        f"{row['packed_seconds'] * 1e3:.2f} ms, x {ratio:.2f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
