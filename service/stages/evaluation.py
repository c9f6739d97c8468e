"""The stage that scores checkpoints on windows of text."""

import gc
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from quantizer.durable import PartStore
from quantizer.kernels.precision import matmul_autocast
from quantizer.models.loading import load_model
from quantizer.models.source import check_checkpoint
from quantizer.running import evaluate as scoring
from quantizer.running.evaluate import evaluate_models
from quantizer.running.memory import to_device
from quantizer.running.quality import Quality
from service.stages.checkpoint import checkpoint_digest
from service.stages.context import RunContext
from service.stages.machine import Machine
from service.stages.windows import Windows
from service.storage.stage_store import StageKey

ORIGINAL = "original"
"""Name of the original model among those that are scored."""


def evaluate(
    context: RunContext,
    checkpoints: Mapping[str, Path],
    windows: Windows,
    label: str = "evaluate",
    *,
    fast: bool = False,
) -> dict[str, Quality]:
    """Score the original and saved checkpoints on the same windows, side by side.

    Args:
        context: gives the original model and the machine.
        checkpoints: folders by name.
        windows: what they are scored on.
        label: what the step is called while progress is shown.
        fast: whether matrix products run in the machine's fast precision instead of float32. It is
            precise enough to compare checkpoints.

    Returns:
        Quality by name; the original is called `original`.
    """
    machine = context.machine
    precision = machine.precision if fast else torch.float32
    inputs = {
        "model": context.model.sha256,
        "checkpoints": {name: checkpoint_digest(path) for name, path in checkpoints.items()},
        "windows": windows.sha256,
        "batch": context.batch,
        "products": str(precision),
        "method": scoring.METHOD,
        "machine": machine.inputs(),
    }

    def make(folder: Path, parts: PartStore) -> None:
        models = {ORIGINAL: load_model(context.model, machine.dtype, machine.device)}
        for name, path in checkpoints.items():
            models[name] = load_checkpoint(path, machine)
        progress = context.reporter.step(label)
        with matmul_autocast(precision, torch.device(machine.device)):
            scores = evaluate_models(
                models, ORIGINAL, windows.tokens, context.batch, parts, progress
            )
        document = {name: score.to_json() for name, score in scores.items()}
        (folder / "evaluation.json").write_text(json.dumps(document), encoding="utf-8")
        models.clear()
        gc.collect()

    folder = context.store.get(StageKey("evaluation", inputs), make)
    stored = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    return {name: Quality.from_json(values) for name, values in stored.items()}


def load_checkpoint(path: Path, machine: Machine) -> Any:
    """Return a saved checkpoint as a user would load it.

    Raises:
        ModelError: it is not one that is safe to load.
        MemoryShort: it does not fit on the device.
    """
    from transformers import AutoModelForCausalLM  # noqa: PLC0415  takes seconds to import

    check_checkpoint(path)
    loaded = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=machine.dtype,
        trust_remote_code=False,
        use_safetensors=True,
        local_files_only=True,
    )
    return to_device(loaded, machine.device).eval()
