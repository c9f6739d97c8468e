"""End-to-end distillation.

Train quantized layers so that the whole model predicts what the original predicts.

The loss is KL(original || model) of the next-token distributions, mean over tokens, at every place
of every window. So errors of one layer are made good by all others. Codes and scales are trained
together, or scales alone, as in the second phase of arXiv 2407.11062, section 3.3 (which trains on
the text's own next tokens; the original's distributions fit it less to the text).
"""

import logging
import time
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import fmean

import torch
from safetensors.torch import load, save
from torch import Tensor

from quantizer.durable import PartStore, Progress
from quantizer.kernels.precision import matmul_autocast
from quantizer.modules.linear import get_linear, replace_linear
from quantizer.packed.weight import QuantizedWeight
from quantizer.running.divergence import divergence
from quantizer.running.memory import MicroBatches
from quantizer.running.runner import BlockRunner
from quantizer.training.descent import LatentTrainer, TrainingSpec, window_order
from quantizer.training.latent import LatentLinear

log = logging.getLogger("bitwright")

METHOD = "distill-3"
"""Names what this module and `quantizer.training.descent` compute.

A change of their results gets a new name.
"""

SAVE_SECONDS = 300.0
"""How much work a kill may cost."""
_TEACHER_WINDOWS, _TEACHER_BATCH = 32, 4
"""Windows of one stored part of the original's states, and how many are run at once."""
_STATE = "training"


def distill(
    runner: BlockRunner,
    stored: Mapping[str, QuantizedWeight],
    windows: Tensor,
    spec: TrainingSpec,
    parts: PartStore,
    on_progress: Progress,
    save_seconds: float = SAVE_SECONDS,
    salient: Mapping[str, Sequence[Tensor]] | None = None,
) -> dict[str, QuantizedWeight]:
    """Train the stored forms of a model's layers, and return them as they are afterwards.

    Memory beside the model's: 16 bytes for each quantized weight (latent codes, gradients, two
    moments) when codes are trained, what a backward pass keeps of the blocks, and the original's
    head inputs. Where all windows of a step do not fit at once, they are taken in pieces, see
    `quantizer.running.memory`; the step stays the same.

    Args:
        runner: the original model; its layers are replaced.
        stored: forms of the layers that are trained, by name.
        windows: int64 [windows, tokens].
        spec: how.
        parts: where the work is kept, so that a later run takes it up.
        on_progress: told of each step.
        save_seconds: pause between two savings of the work.
        salient: groups whose scales are trained, see `quantizer.importance.saliency`; None for all.
    """
    teacher = _teacher(runner, windows, spec.precision, parts)
    layers = {
        name: LatentLinear(get_linear(runner.model, name), form) for name, form in stored.items()
    }
    for parameter in runner.model.parameters():
        parameter.requires_grad_(False)
    for name, layer in layers.items():
        replace_linear(runner.model, name, layer.to(windows.device))
    training, order, micro_batches = (
        LatentTrainer(layers, spec, salient),
        window_order(len(windows), spec),
        MicroBatches(),
    )
    kept = parts.read(_STATE)
    if kept is not None:
        training.loads(kept)
    saved = time.monotonic()
    while training.step < spec.steps:
        rows = order[training.step]
        seen, wanted = windows[rows.to(windows.device)], teacher[rows].to(windows.device)
        gather = partial(_gather, runner, seen, wanted, spec.precision)
        training.descend(sum(micro_batches.run(gather, len(rows), undo=training.forget)))
        if time.monotonic() - saved >= save_seconds or training.step == spec.steps:
            parts.write(_STATE, training.dumps())
            saved = time.monotonic()
        on_progress(training.step, spec.steps)
    log.info("distilled: loss %.4f in the first steps, %.4f in the last", *_ends(training.losses))
    return {name: layer.stored() for name, layer in layers.items()}


def _gather(
    runner: BlockRunner, windows: Tensor, teacher: Tensor, precision: torch.dtype, some: slice
) -> float:
    """Add the part of some windows to the gradients of the mean loss of all, and return their part of that loss."""
    ids = windows[some]
    with matmul_autocast(precision, ids.device):
        states = runner.final_states_with_gradient(ids)
        losses, gradient = divergence(runner, ids, states.detach(), teacher[some].to(states.dtype))
    torch.autograd.backward(states, gradient.to(states.dtype) / len(windows))
    return float(losses.sum()) / len(windows)


def _teacher(
    runner: BlockRunner, windows: Tensor, precision: torch.dtype, parts: PartStore
) -> Tensor:
    """Return what enters the head of the original model, [windows, tokens, hidden] in `precision`, on the CPU."""
    found = []
    for index, ids in enumerate(torch.split(windows, _TEACHER_WINDOWS)):
        data = parts.read(f"teacher-{index:04d}")
        if data is None:
            with matmul_autocast(precision, ids.device):
                states = torch.cat(
                    [runner.final_states(each) for each in torch.split(ids, _TEACHER_BATCH)]
                )
            data = save({"states": states.to(precision).cpu()})
            parts.write(f"teacher-{index:04d}", data)
        found.append(load(data)["states"])
    return torch.cat(found)


def _ends(losses: Sequence[float]) -> tuple[float, float]:
    """Return the means of the first and of the last tenth."""
    count = -(-len(losses) // 10)
    return fmean(losses[:count]), fmean(losses[-count:])
