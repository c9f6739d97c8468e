"""End-to-end distillation: the quantized model learns to predict what the original predicts.

The loss is KL(original || model) of the next-token distributions, mean over all tokens of all
windows. So the errors of one layer are compensated by all others. Codes and scales are trained
together, or scales alone as in the second phase of arXiv 2407.11062, section 3.3. The source trains
on the text's own next tokens; the original's distributions fit the model less to the text.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import fmean

import torch
from torch import Tensor

from quantizer.durable import PartStore, Progress
from quantizer.importance.saliency import find_salient_groups
from quantizer.kernels.precision import matmul_autocast
from quantizer.modules.linear import get_linear, replace_linear
from quantizer.packed.weight import QuantizedWeight
from quantizer.running.divergence import divergence
from quantizer.running.memoized import memoized
from quantizer.running.memory import MicroBatches
from quantizer.running.moments import Calibration
from quantizer.running.runner import BlockRunner
from quantizer.structure.blocks import find_layers
from quantizer.training.latent import LatentLinear
from quantizer.training.spec import TrainingSpec
from quantizer.training.trainer import LatentTrainer

log = logging.getLogger("bitwright")

METHOD = "distill-3"
"""Identifies what this module and `quantizer.training.trainer` compute.

It is part of the keys of stored results: a change of the results needs a new name.
"""

SALIENCY_WINDOWS = 8
"""Windows on which salient groups are found."""
SAVE_SECONDS = 300.0
"""Seconds between two savings of the state: the work that an interruption may cost."""

_STATE = "training"
_ORIGINAL_PART_WINDOWS = 32
"""Windows of one stored part of the original model's final states."""
_ORIGINAL_BATCH = 4
"""Windows of these that run at once."""


def distill(
    runner: BlockRunner,
    quantized: Mapping[str, QuantizedWeight],
    windows: Tensor,
    spec: TrainingSpec,
    parts: PartStore,
    on_progress: Progress,
) -> dict[str, QuantizedWeight]:
    """Train the quantized layers of a model, and return them.

    Memory beside the model's: 16 bytes for each quantized weight if codes are trained (latent
    codes, gradients, two moments), the activations that a backward pass keeps, and the original's
    final states. Windows of a step that do not fit into memory together run in smaller batches, see
    `quantizer.running.memory`; the step stays the same.

    Args:
        runner: the original model; its layers are replaced.
        quantized: the layers that are trained, by name.
        windows: token ids, int64 [windows, tokens].
        spec: how the layers are trained.
        parts: where the state is stored, so that a later run continues from it.
        on_progress: called after each step.
    """
    device = windows.device
    salient = _salient_groups(runner, quantized, windows, spec)
    original = _original_states(runner, windows, spec.precision, parts)
    layers = {
        name: LatentLinear(get_linear(runner.model, name), weight)
        for name, weight in quantized.items()
    }
    runner.model.requires_grad_(requires_grad=False)
    for name, layer in layers.items():
        replace_linear(runner.model, name, layer.to(device))
    trainer = LatentTrainer(layers, spec, salient)
    state = parts.read(_STATE)
    if state is not None:
        trainer.loads(state)
    order = spec.window_order(len(windows))
    micro_batches = MicroBatches()
    saved = time.monotonic()
    while trainer.steps_done < spec.steps:
        rows = order[trainer.steps_done]
        ids = windows[rows.to(device)]
        accumulate = partial(_accumulate, runner, ids, original[rows].to(device), spec.precision)
        trainer.step(sum(micro_batches.run(accumulate, len(rows), undo=trainer.zero_grad)))
        if time.monotonic() - saved >= SAVE_SECONDS or trainer.steps_done == spec.steps:
            parts.write(_STATE, trainer.dumps())
            saved = time.monotonic()
        on_progress(trainer.steps_done, spec.steps)
    log.info(
        "distillation: loss %.4f in the first tenth of the steps, %.4f in the last",
        *_ends(trainer.losses),
    )
    return {name: layer.quantized() for name, layer in layers.items()}


def _salient_groups(
    runner: BlockRunner,
    quantized: Mapping[str, QuantizedWeight],
    windows: Tensor,
    spec: TrainingSpec,
) -> dict[str, list[Tensor]] | None:
    layers = [layer for layer in find_layers(runner.model) if layer.name in quantized]
    calibration = Calibration(windows[:SALIENCY_WINDOWS], spec.batch)
    return find_salient_groups(runner, layers, quantized, calibration, spec.salient, spec.seed)


def _accumulate(
    runner: BlockRunner, ids: Tensor, original: Tensor, precision: torch.dtype, rows: slice
) -> float:
    """Add the gradients of some windows of a step, and return their part of the step's loss.

    Args:
        runner: the model with latent layers.
        ids: token ids of the step, int64 [windows, tokens].
        original: final states of the original model, [windows, tokens, hidden].
        precision: dtype of the matrix products.
        rows: the windows.
    """
    some = ids[rows]
    with matmul_autocast(precision, some.device):
        states = runner.final_states_with_gradient(some)
        target = original[rows].to(states.dtype)
        losses, gradient = divergence(runner, some, states.detach(), target)
    torch.autograd.backward(states, gradient.to(states.dtype) / len(ids))
    return float(losses.sum()) / len(ids)


def _original_states(
    runner: BlockRunner, windows: Tensor, precision: torch.dtype, parts: PartStore
) -> Tensor:
    """Return the final states of the original model, on the CPU.

    Returns:
        [windows, tokens, hidden] in `precision`.
    """

    def compute(ids: Tensor) -> dict[str, Tensor]:
        with matmul_autocast(precision, ids.device):
            states = [runner.final_states(batch) for batch in torch.split(ids, _ORIGINAL_BATCH)]
        return {"states": torch.cat(states).to(precision)}

    stored = [
        memoized(parts, f"teacher-{index:04d}", partial(compute, ids))
        for index, ids in enumerate(torch.split(windows, _ORIGINAL_PART_WINDOWS))
    ]
    return torch.cat([part["states"] for part in stored])


def _ends(losses: Sequence[float]) -> tuple[float, float]:
    """Return the means of the first and of the last tenth."""
    count = -(-len(losses) // 10)
    return fmean(losses[:count]), fmean(losses[-count:])
