"""A packed model takes much less memory than its weights in 16 bits.

Measured as the peak memory of a process of its own, by the operating system.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from quantizer.conversion.checkpoint import save_checkpoint
from quantizer.conversion.pack import pack_model
from quantizer.models.loading import load_model
from quantizer.models.source import find_model
from quantizer.packed.weight import QuantizedWeight
from quantizer.plans.fidelity import Fidelity
from quantizer.plans.plan import Plan
from quantizer.structure.blocks import find_layers
from tests.benchmarks.kernels import random_layer
from tests.support.paths import ROOT
from tests.support.quantized import PackedModel
from tests.support.tiny_models import VOCABULARY, make_tokenizer

FIDELITY = Fidelity.parse("int2+3r0.375g64s6")
GROWTH = """
import sys, torch, transformers, quantizer.conversion.transformers_format
from pathlib import Path

def run(folder, rows):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    with torch.inference_mode():
        for count in rows:
            model(input_ids=torch.ones(1, count, dtype=torch.int64))

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

small, large = sys.argv[1:]
run(small, (1, 8, 40))
before = peak()
run(large, (1, 8))
print(peak() - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, int]:
    """Return a model of 42 million weights in layers, its packed checkpoint, and its 16-bit bytes.

    The bytes are those of the layers alone.
    """
    folder = tmp_path_factory.mktemp("large")
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 6,
    }
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(**sizes, num_attention_heads=12), dtype=torch.bfloat16
    )
    model.save_pretrained(folder / "original")
    make_tokenizer().save_pretrained(folder / "original")
    source = find_model(str(folder / "original"), folder / "cache")
    layers = find_layers(model)
    shapes = {layer.name: (layer.out_features, layer.in_features) for layer in layers}
    plan = Plan(layers, (FIDELITY,) * len(layers))
    model = load_model(source, torch.bfloat16, "cpu")
    weights = {
        name: QuantizedWeight(FIDELITY, *shape, random_layer(FIDELITY, shape, "cpu"))
        for name, shape in shapes.items()
    }
    pack_model(model, plan, weights)
    save_checkpoint(model, source, plan, folder / "packed")
    return (
        folder / "original",
        folder / "packed",
        2 * sum(rows * columns for rows, columns in shapes.values()),
    )


def test_a_model_is_loaded_and_run_in_less_memory_than_half_its_weights_take(
    large: tuple[Path, Path, int], packed: PackedModel
) -> None:
    case, (original, packed_folder, weight_bytes) = packed("llama"), large

    def growth(small: Path, folder: Path) -> int:
        command = [sys.executable, "-c", GROWTH, str(small), str(folder)]
        return int(
            subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        )

    assert growth(case.source.path, original) > 0.8 * weight_bytes
    assert growth(case.folder, packed_folder) < 0.4 * weight_bytes
