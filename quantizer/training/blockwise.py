"""Block-wise training: each block in turn learns to give, on what the trained blocks before it give, what the original gives.

Source: arXiv 2407.11062, section 3.2 (weights and scales of a block together; zero points stay).
The loss of a block is the mean squared difference of its output from the original's, over that
output's mean square. One block and its activations are held at a time, so this works for models of
which all weights cannot be trained at once. Windows of a step that do not fit at once are taken in
pieces, see `quantizer.running.memory`.

With clipping trained, adapters, and a penalty this is SigniQ on ApiQ (arXiv 2504.13932 on
2402.05147): the penalty is lambda * sum g^2 (Wq - W)^2 / sum g^2 W^2 over the block's layers, g^2
being the mean squared gradient of the end loss and Wq the weight without its adapter. The source
sums without the denominator; with it lambda means the same in every block and model.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from safetensors.torch import load, save
from torch import Tensor

from quantizer.durable import PartStore, Progress
from quantizer.kernels.precision import matmul_autocast
from quantizer.modules.linear import get_linear, replace_linear, set_dequantized_weight
from quantizer.packed.weight import QuantizedWeight
from quantizer.plans.plan import LayerSpec, by_block
from quantizer.running.memory import MicroBatches
from quantizer.running.runner import BlockRunner
from quantizer.training.descent import LatentTrainer, TrainingSpec, window_order
from quantizer.training.latent import LatentLinear

log = logging.getLogger("bitwright")

METHOD = "blockwise-3"
"""Names what this module and `quantizer.training.descent` compute.

A change of their results gets a new name.
"""


@dataclass(frozen=True, slots=True)
class TrainedBlock:
    """What training one block gave.

    Attributes:
        weights: stored forms by layer name.
        before: loss of the forms that it started from, on all windows.
        after: loss of the forms that it ended with; never more.
    """

    weights: dict[str, QuantizedWeight]
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class Penalty:
    """A price on moving weights that matter.

    Attributes:
        weight: lambda.
        squared_gradients: importance of each weight, float32 [out, in] by layer name.
    """

    weight: float
    squared_gradients: Mapping[str, Tensor]

    def of(self, layers: Mapping[str, LatentLinear], originals: Mapping[str, Tensor]) -> Tensor:
        """Return the penalty of some layers, differentiable; zero where nothing matters."""
        moved, whole = torch.zeros(()), torch.zeros(())
        for name, layer in layers.items():
            importance = self.squared_gradients[name]
            moved = (
                moved.to(importance.device)
                + (importance * (layer.grid_weight() - originals[name]).square()).sum()
            )
            whole = whole.to(importance.device) + (importance * originals[name].square()).sum()
        return self.weight * moved / whole.clamp(min=torch.finfo(torch.float32).tiny)


def train_blocks(
    runner: BlockRunner,
    layers: Sequence[LayerSpec],
    stored: Mapping[str, QuantizedWeight],
    windows: Tensor,
    spec: TrainingSpec,
    parts: PartStore,
    on_progress: Progress,
    penalty: Penalty | None = None,
) -> list[TrainedBlock]:
    """Train the stored forms of a model's layers, block by block, and leave the model running with them.

    Args:
        runner: the original model; its weights are overwritten.
        layers: the layers that are trained.
        stored: their forms, by name.
        windows: int64 [windows, tokens].
        spec: how each block is trained.
        parts: where finished blocks are kept, so that a later run takes the work up.
        on_progress: told of each finished block.
        penalty: what keeps important weights near the original, if anything does.

    Returns:
        every block; of those that hold none of the layers, nothing is trained.
    """
    for parameter in runner.model.parameters():
        parameter.requires_grad_(False)
    batches = torch.split(windows, spec.batch)
    inputs = [runner.initial_states(batch) for batch in batches]
    targets, found = list(inputs), []
    members = by_block(layers)
    count = len(runner.blocks)
    for index in range(count):
        targets = runner.advance(batches, targets, index)
        forms = {layer.name: stored[layer.name] for layer in members.get(index, ())}
        name = f"trained-{index:04d}"
        data = parts.read(name)
        if data is None:
            block = _train_block(runner, forms, windows, inputs, targets, spec, index, penalty)
            parts.write(name, _encode(block))
        else:
            block = _decode(data, forms)
        for layer, form in block.weights.items():
            set_dequantized_weight(runner.model, layer, form)
        inputs = runner.advance(batches, inputs, index)
        found.append(block)
        on_progress(index + 1, count)
    nearer = sum(block.after < block.before for block in found)
    log.info(
        "blocks that came nearer: %d of %d; the others stay as they were",
        nearer,
        sum(bool(block.weights) for block in found),
    )
    return found


def _train_block(
    runner: BlockRunner,
    forms: Mapping[str, QuantizedWeight],
    windows: Tensor,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    spec: TrainingSpec,
    index: int,
    penalty: Penalty | None,
) -> TrainedBlock:
    """Train one block; whatever happens, it does not end with forms of a higher loss than it was given."""
    linears = {name: get_linear(runner.model, name) for name in forms}

    def loss_of(weights: Mapping[str, QuantizedWeight]) -> float:
        originals = {name: linear.weight.data for name, linear in linears.items()}
        for name, form in weights.items():
            set_dequantized_weight(runner.model, name, form)
        pairs = zip(torch.split(windows, spec.batch), inputs, targets, strict=True)
        losses = [
            _loss(runner.run_blocks(ids, states, index, index + 1), target) * len(ids)
            for ids, states, target in pairs
        ]
        for name, weight in originals.items():
            linears[name].weight.data = weight
        return float(torch.stack(losses).sum()) / len(windows)

    before = loss_of(forms)
    if not forms:
        return TrainedBlock({}, before, before)
    clipping, originals = (
        spec.trained == "clipping",
        {name: linear.weight.data.float() for name, linear in linears.items()},
    )
    layers = {
        name: LatentLinear(linears[name], form, clipping=clipping).to(windows.device)
        for name, form in forms.items()
    }
    for name, layer in layers.items():
        replace_linear(runner.model, name, layer)
    all_inputs, all_targets = torch.cat(list(inputs)), torch.cat(list(targets))
    training, micro_batches = LatentTrainer(layers, spec), MicroBatches()

    def gather(rows: Tensor, some: slice) -> float:
        here = rows[some]
        with matmul_autocast(spec.precision, windows.device):
            output = runner.run_block_with_gradient(windows[here], all_inputs[here], index)
        with torch.enable_grad():
            loss = (
                _distance(output, all_targets[here])
                / _size(all_targets[rows])
                * (len(here) / len(rows))
            )
            if penalty is not None and some.start == 0:  # once for all pieces
                loss = loss + penalty.of(layers, originals)
        torch.autograd.backward(loss)
        return float(loss.detach())

    for rows in window_order(len(windows), spec).to(windows.device):
        training.descend(
            sum(micro_batches.run(partial(gather, rows), len(rows), undo=training.forget))
        )
    trained = {name: layer.stored() for name, layer in layers.items()}
    for name, linear in linears.items():
        replace_linear(runner.model, name, linear)
    after = loss_of(trained)
    return (
        TrainedBlock(trained, before, after)
        if after < before
        else TrainedBlock(dict(forms), before, before)
    )


def _loss(output: Tensor, target: Tensor) -> Tensor:
    return _distance(output, target) / _size(target)


def _distance(output: Tensor, target: Tensor) -> Tensor:
    return (output.float() - target.float()).square().mean()


def _size(target: Tensor) -> Tensor:
    return target.float().square().mean().clamp(min=torch.finfo(torch.float32).tiny)


def _encode(block: TrainedBlock) -> bytes:
    tensors = {"losses": torch.tensor([block.before, block.after], dtype=torch.float64)}
    for layer, form in block.weights.items():
        tensors |= {
            f"{layer}|{name}": tensor.cpu().contiguous() for name, tensor in form.tensors.items()
        }
    data: bytes = save(tensors)
    return data


def _decode(data: bytes, forms: Mapping[str, QuantizedWeight]) -> TrainedBlock:
    tensors = load(data)
    before, after = tensors["losses"].tolist()
    weights = {
        layer: QuantizedWeight(
            form.fidelity,
            form.out_features,
            form.in_features,
            {name: tensors[f"{layer}|{name}"] for name in form.tensors},
        )
        for layer, form in forms.items()
    }
    return TrainedBlock(weights, before, after)
