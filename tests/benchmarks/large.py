"""Time and memory of quantizing a model of 8 billion random weights on a GPU, block by block.

They are compared with the least that must be moved and computed.

    python -m tests.benchmarks.large [--blocks 3]

The whole model, in the shape of Llama 3 8B, lies in the GPU's memory; the first blocks are worked
on, the first of them to warm up. What weights are does not change what is computed. Appends a row
for each phase to results/large.jsonl.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from allocator.demands.menu import choose_menu
from allocator.profiling.candidates import Candidates, quantize_candidates
from quantizer.conversion.blocks import QuantizationSpec, quantize_blocks
from quantizer.conversion.quantized_block import find_block
from quantizer.durable import Progress
from quantizer.plans.fidelity import Fidelity
from quantizer.plans.plan import by_block
from quantizer.running.moments import Calibration
from quantizer.running.runner import BlockRunner
from quantizer.structure.blocks import LayerSpec, find_layers
from quantizer.training.blockwise import train_blocks
from quantizer.training.spec import TrainingSpec
from service.request.effort import DEFAULT, EFFORTS, FAST
from service.stages.recipe import CODES
from service.stages.training_phases import ADAPTER_RATE, CODE_RATE
from service.storage.stage_store import PartStore
from tests.benchmarks.record import circumstances

RESULTS = Path(__file__).parent / "results" / "large.jsonl"
SHAPE = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=8192,
)
FIDELITY = Fidelity.parse("int2+3r0.375g64s6")
BUDGET_BPW = 2.5
WINDOWS, TOKENS, BATCH = 8, 512, 4
DEVICE = "cuda"


class Enough(Exception):
    """As many blocks were measured as were wanted."""


class Stopwatch:
    """Notes when each block is finished, and ends the work after the last that is wanted."""

    def __init__(self, blocks: int) -> None:
        """Begin a phase."""
        self._blocks, self._last, self.seconds = blocks, time.perf_counter(), list[float]()
        torch.cuda.reset_peak_memory_stats()

    def __call__(self, done: int, _: int) -> None:
        """Note that a block is finished."""
        torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now
        if done == self._blocks:
            raise Enough


def random_model() -> Any:
    """Return the model, in bfloat16 on the GPU."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(SHAPE, dtype=torch.bfloat16).eval()


def rate(dtype: torch.dtype, size: int) -> float:
    """Return operations a second of a large product of random matrices; median of 5."""
    left, right = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    spent = []
    for _ in range(6):
        torch.cuda.synchronize()
        start = time.perf_counter()
        left @ right
        torch.cuda.synchronize()
        spent.append(time.perf_counter() - start)
    return 2 * size**3 / median(spent[1:])


def quantizing_floor(layers: list[LayerSpec], fidelities: int, rates: dict[str, float]) -> float:
    """Return the seconds of the products that quantizing one block takes.

    Two passes forward, moments, inverses, and updates.
    """
    tokens, inputs = WINDOWS * TOKENS, [layer.in_features for layer in layers]
    groups = [SHAPE.hidden_size] * 3 + [SHAPE.intermediate_size]
    forward = 4 * sum(layer.weights for layer in layers) * tokens
    updates = (
        sum(layer.weights * each for layer, each in zip(layers, inputs, strict=True)) * fidelities
    )
    moments, inverses = (
        sum(2 * tokens * each**2 for each in groups),
        sum(each**3 for each in groups),
    )
    return (
        forward / rates["bfloat16"]
        + (moments + updates) / rates["float32"]
        + inverses / rates["float64"]
    )


def training_floor(layers: list[LayerSpec], windows: int, rates: dict[str, float]) -> float:
    """Return the seconds of the products that training one block takes.

    A step on each window, and four passes forward.
    """
    return (
        (6 + 4 * 2) * sum(layer.weights for layer in layers) * windows * TOKENS / rates["bfloat16"]
    )


def measure(
    name: str, blocks: int, work: Callable[[Progress], Any], floor_seconds: float, kept_bytes: int
) -> dict[str, Any]:
    """Return the row of a phase."""
    watch = Stopwatch(blocks)
    with suppress(Enough):
        work(watch)
    row = {
        "phase": name,
        "seconds": watch.seconds,
        "block_seconds": median(watch.seconds[1:]),
        "floor_seconds": floor_seconds,
        "gpu_peak_bytes": torch.cuda.max_memory_allocated(),
        "kept_bytes": kept_bytes,
    }
    print(
        f"{name}: {row['block_seconds']:.2f} s a block, floor {floor_seconds:.2f}; "
        f"{row['gpu_peak_bytes'] / 1e9:.1f} GB",
        flush=True,
    )
    return row


def rows(blocks: int) -> list[dict[str, Any]]:
    """Measure the phases."""
    rates = {
        "bfloat16": rate(torch.bfloat16, 8192),
        "float32": rate(torch.float32, 8192),
        "float64": rate(torch.float64, 4096),
    }
    model = random_model()
    runner, layers = BlockRunner(model, torch.bfloat16), find_layers(model)
    model_bytes = sum(
        parameter.numel() * parameter.element_size() for parameter in model.parameters()
    )
    effort, ids = (
        EFFORTS[DEFAULT],
        torch.randint(
            SHAPE.vocab_size, (EFFORTS[DEFAULT].block_steps * BATCH, TOKENS), device=DEVICE
        ),
    )
    budget_bytes = round(sum(layer.weights for layer in layers) * BUDGET_BPW / 8)
    menu, one = choose_menu(layers, budget_bytes), by_block(layers)[0]
    spec = TrainingSpec(
        effort.block_steps,
        BATCH,
        code_rate=CODE_RATE,
        scale_rate=CODES.scale_rate,
        adapter_rate=ADAPTER_RATE,
        precision=torch.bfloat16,
    )
    choices = {layer.name: (FIDELITY,) for layer in layers}

    def states_bytes(windows: Tensor) -> int:
        return windows.numel() * SHAPE.hidden_size * 2

    found = []
    with tempfile.TemporaryDirectory() as folder:
        forms, few = PartStore(Path(folder) / "forms"), Calibration(ids[:WINDOWS], BATCH)
        kept = model_bytes + states_bytes(few.windows)
        found.append(
            measure(
                f"quantize, {FAST}",
                blocks,
                lambda told: quantize_blocks(
                    runner, layers, QuantizationSpec(choices), few, forms, told
                ),
                quantizing_floor(one, 1, rates),
                kept,
            )
        )
        found.append(
            measure(
                f"profile, {len(menu.fidelities)} fidelities",
                blocks,
                lambda told: quantize_candidates(
                    runner,
                    Candidates(tuple(layers), menu, PartStore(Path(folder) / "profile")),
                    few,
                    told,
                ),
                quantizing_floor(one, len(menu.fidelities), rates),
                kept,
            )
        )
        stored = {}
        for index, members in by_block(layers).items():
            block = find_block(forms, members, choices, index)
            if block is not None:
                stored |= {name: weights[FIDELITY.name] for name, weights in block.weights.items()}
        found.append(
            measure(
                f"block-wise training, {DEFAULT}",
                blocks,
                lambda told: train_blocks(
                    runner, stored, ids, spec, PartStore(Path(folder) / "trained"), told
                ),
                training_floor(one, len(ids), rates),
                model_bytes + 2 * states_bytes(ids),
            )
        )
    machine = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "rates": rates,
        "model_bytes": model_bytes,
    }
    return [row | machine for row in found]


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--blocks", type=int, default=3)
    found = rows(parser.parse_args().blocks)
    with RESULTS.open("a") as file:
        file.writelines(
            json.dumps(row | {"circumstances": circumstances()}) + "\n" for row in found
        )


if __name__ == "__main__":
    main()
