"""The stage that scores checkpoints on held-out text."""

import gc
import json
from pathlib import Path
from typing import Any

import torch

from quantizer.durable import PartStore
from quantizer.kernels.precision import matmul_autocast
from quantizer.models.folder import ModelFolder
from quantizer.models.loading import load_model
from quantizer.models.source import check_checkpoint
from quantizer.running import evaluate
from quantizer.running.evaluate import evaluate_models
from quantizer.running.memory import to_device
from quantizer.running.quality import Quality
from service.stages.checkpoint import checkpoint_digest
from service.stages.machine import Machine
from service.stages.progress import Reporter
from service.stages.windows import Windows
from service.storage.disk import _write
from service.storage.stage_store import StageKey, StageStore


def evaluation(
    store: StageStore,
    model: ModelFolder,
    checkpoints: dict[str, Path],
    windows: Windows,
    batch: int,
    machine: Machine,
    reporter: Reporter,
    label: str = "evaluate",
    *,
    fast: bool = False,
) -> dict[str, Quality]:
    """Score the original and the saved checkpoints on the same windows, side by side.

    `fast` is enough to tell which is best.
    """
    precision = machine.precision if fast else torch.float32
    inputs = {
        "model": model.sha256,
        "checkpoints": {name: checkpoint_digest(path) for name, path in checkpoints.items()},
        "windows": windows.sha256,
        "batch": batch,
        "products": str(precision),
        "method": evaluate.METHOD,
        "machine": machine.inputs(),
    }

    def make(folder: Path, parts: PartStore) -> None:
        models = {"original": load_model(model, machine.dtype, machine.device)}
        models |= {name: load_checkpoint(path, machine) for name, path in checkpoints.items()}
        with matmul_autocast(precision, torch.device(machine.device)):
            scores = evaluate_models(
                models, "original", windows.tokens, batch, parts, reporter.step(label)
            )
        _write(
            folder / "evaluation.json",
            json.dumps({name: score.to_json() for name, score in scores.items()}),
        )
        models.clear()
        gc.collect()

    folder = store.get(StageKey("evaluation", inputs), make)
    stored = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    return {name: Quality.from_json(values) for name, values in stored.items()}


def load_checkpoint(path: Path, machine: Machine) -> Any:
    """Return a saved checkpoint as a user would load it.

    Raises:
        ModelError: it is not one that is safe to load.
        MemoryShort: it does not fit on the device.
    """
    from transformers import AutoModelForCausalLM  # noqa: PLC0415  see quantizer.models.loading

    check_checkpoint(path)
    loaded = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=machine.dtype,
        trust_remote_code=False,
        use_safetensors=True,
        local_files_only=True,
    )
    return to_device(loaded, machine.device).eval()
