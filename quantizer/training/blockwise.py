"""Block-wise training: each block learns to give the output of the original block.

A trained block gets what the trained blocks before it give, the original block what the original
blocks before it give. Source: arXiv 2407.11062, section 3.2 (weights and scales of a block
together; zero points stay). The loss of a block is the mean squared difference of the two outputs,
over the mean square of the original one. Only one block and its activations are trained at a time,
so this works for models of which not all weights can be trained at once. Windows of a step that do
not fit into memory together run in smaller batches, see `quantizer.running.memory`.

With clipping trained, adapters, and a penalty (`quantizer.training.penalty`) this is SigniQ on ApiQ
(arXiv 2504.13932 on 2402.05147).
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from safetensors.torch import load, save
from torch import Tensor

from quantizer.durable import PartStore, Progress
from quantizer.importance.fisher import squared_gradients
from quantizer.kernels.precision import matmul_autocast
from quantizer.modules.linear import get_linear, replace_linear, set_dequantized_weight
from quantizer.packed.weight import QuantizedWeight
from quantizer.plans.plan import by_block
from quantizer.running.memory import MicroBatches
from quantizer.running.runner import BlockRunner
from quantizer.running.structure import find_layers
from quantizer.training.latent import LatentLinear
from quantizer.training.penalty import Penalty
from quantizer.training.spec import TrainingSpec
from quantizer.training.trainer import LatentTrainer

log = logging.getLogger("bitwright")

METHOD = "blockwise-3"
"""Identifies what this module and `quantizer.training.trainer` compute.

It is part of the keys of stored results: a change of the results needs a new name.
"""

PENALTY_WINDOWS = 32
"""Windows on which the importance of weights is measured for the penalty."""


@dataclass(frozen=True, slots=True)
class TrainedBlock:
    """Result of training one block.

    Attributes:
        weights: quantized layers by name.
        loss_before: loss of the quantized layers before training, on all windows.
        loss_after: loss of `weights`; never more than `loss_before`.
    """

    weights: dict[str, QuantizedWeight]
    loss_before: float
    loss_after: float


def train_blocks(
    runner: BlockRunner,
    quantized: Mapping[str, QuantizedWeight],
    windows: Tensor,
    spec: TrainingSpec,
    parts: PartStore,
    on_progress: Progress,
) -> list[TrainedBlock]:
    """Train the quantized layers of a model block by block.

    At the end, the model has the dequantized weights of the trained layers.

    Args:
        runner: the original model; its weights are overwritten.
        quantized: the layers that are trained, by name.
        windows: token ids, int64 [windows, tokens].
        spec: how each block is trained.
        parts: where finished blocks are stored, so that a later run continues from them.
        on_progress: called after each block.

    Returns:
        Every block of the model; a block that holds none of the layers stays as it is.
    """
    layers = [layer for layer in find_layers(runner.model) if layer.name in quantized]
    penalty = None
    if spec.penalty:
        squared = squared_gradients(runner, layers, windows[:PENALTY_WINDOWS])
        penalty = Penalty(spec.penalty, squared)
    runner.model.requires_grad_(requires_grad=False)
    members = by_block(layers)
    batches = torch.split(windows, spec.batch)
    inputs = [runner.initial_states(batch) for batch in batches]
    targets = list(inputs)
    blocks = []
    for index in range(len(runner.blocks)):
        targets = runner.advance(batches, targets, index)
        own = {layer.name: quantized[layer.name] for layer in members.get(index, ())}
        part = f"trained-{index:04d}"
        data = parts.read(part)
        if data is None:
            block = _BlockTraining(runner, index, spec, windows, inputs, targets)
            trained = block.train(own, penalty)
            parts.write(part, _encode(trained))
        else:
            trained = _decode(data, own)
        for name, weight in trained.weights.items():
            set_dequantized_weight(runner.model, name, weight)
        inputs = runner.advance(batches, inputs, index)
        blocks.append(trained)
        on_progress(index + 1, len(runner.blocks))
    log.info(
        "training lowered the loss of %d of %d blocks; the others stay as they were",
        sum(block.loss_after < block.loss_before for block in blocks),
        sum(bool(block.weights) for block in blocks),
    )
    return blocks


@dataclass(frozen=True, slots=True)
class _BlockTraining:
    """A block, and the data on which it is trained.

    Attributes:
        runner: the model.
        index: index of the block.
        spec: how the block is trained.
        windows: token ids, int64 [windows, tokens].
        inputs: hidden states that enter the block, for each batch of windows.
        targets: output of the original block, for each batch of windows.
    """

    runner: BlockRunner
    index: int
    spec: TrainingSpec
    windows: Tensor
    inputs: Sequence[Tensor]
    targets: Sequence[Tensor]

    def train(
        self, quantized: Mapping[str, QuantizedWeight], penalty: Penalty | None
    ) -> TrainedBlock:
        """Return the trained layers, or the untrained ones if their loss is not higher.

        Args:
            quantized: the layers of the block by name.
            penalty: a penalty that is added to the loss while training, if any.
        """
        before = self._loss(quantized)
        untrained = TrainedBlock(dict(quantized), before, before)
        if not quantized:
            return untrained
        trained = self._descend(quantized, penalty)
        after = self._loss(trained)
        return TrainedBlock(trained, before, after) if after < before else untrained

    def _loss(self, quantized: Mapping[str, QuantizedWeight]) -> float:
        """Return the loss on all windows with some quantized layers; the model stays as it is."""
        linears = {name: get_linear(self.runner.model, name) for name in quantized}
        before = {name: linear.weight.data for name, linear in linears.items()}
        for name, weight in quantized.items():
            set_dequantized_weight(self.runner.model, name, weight)
        losses = []
        batches = torch.split(self.windows, self.spec.batch)
        for ids, states, target in zip(batches, self.inputs, self.targets, strict=True):
            output = self.runner.run_blocks(ids, states, self.index, self.index + 1)
            distance = _mean_square(output.float() - target.float())
            losses.append(distance / _size(target) * len(ids))
        for name, linear in linears.items():
            linear.weight.data = before[name]
        return float(torch.stack(losses).sum()) / len(self.windows)

    def _descend(
        self, quantized: Mapping[str, QuantizedWeight], penalty: Penalty | None
    ) -> dict[str, QuantizedWeight]:
        """Return the quantized layers after all steps of training."""
        model = self.runner.model
        linears = {name: get_linear(model, name) for name in quantized}
        originals = {name: linear.weight.data.float() for name, linear in linears.items()}
        clipping = self.spec.trained == "clipping"
        layers = {}
        for name, weight in quantized.items():
            layer = LatentLinear(linears[name], weight, clipping=clipping)
            layers[name] = layer.to(self.windows.device)
            replace_linear(model, name, layers[name])
        inputs = torch.cat(list(self.inputs))
        targets = torch.cat(list(self.targets))
        trainer = LatentTrainer(layers, self.spec)
        micro_batches = MicroBatches()

        def accumulate(rows: Tensor, some: slice) -> float:
            """Add the gradients of some rows to those of the step; return their part of the loss."""
            here = rows[some]
            with matmul_autocast(self.spec.precision, self.windows.device):
                output = self.runner.run_block_with_gradient(
                    self.windows[here], inputs[here], self.index
                )
            with torch.enable_grad():
                distance = _mean_square(output.float() - targets[here].float())
                loss = distance / _size(targets[rows]) * (len(here) / len(rows))
                if penalty is not None and some.start == 0:  # once for all micro-batches
                    loss = loss + penalty.of(layers, originals)
            torch.autograd.backward(loss)
            return float(loss.detach())

        for rows in self.spec.window_order(len(self.windows)).to(self.windows.device):
            work = partial(accumulate, rows)
            trainer.step(sum(micro_batches.run(work, len(rows), undo=trainer.zero_grad)))
        for name, linear in linears.items():
            replace_linear(model, name, linear)
        return {name: layer.quantized() for name, layer in layers.items()}


def _mean_square(values: Tensor) -> Tensor:
    return values.square().mean()


def _size(target: Tensor) -> Tensor:
    return _mean_square(target.float()).clamp(min=torch.finfo(torch.float32).tiny)


def _encode(block: TrainedBlock) -> bytes:
    losses = torch.tensor([block.loss_before, block.loss_after], dtype=torch.float64)
    tensors = {"losses": losses}
    for layer, weight in block.weights.items():
        tensors |= {
            f"{layer}|{name}": tensor.cpu().contiguous() for name, tensor in weight.tensors.items()
        }
    data: bytes = save(tensors)
    return data


def _decode(data: bytes, quantized: Mapping[str, QuantizedWeight]) -> TrainedBlock:
    """Return the block that `_encode` wrote.

    Args:
        data: what `_encode` returned.
        quantized: the untrained layers of the block by name; trained ones have the same tensors.
    """
    tensors = load(data)
    before, after = tensors["losses"].tolist()
    weights = {
        layer: QuantizedWeight(
            weight.fidelity,
            weight.out_features,
            weight.in_features,
            {name: tensors[f"{layer}|{name}"] for name in weight.tensors},
        )
        for layer, weight in quantized.items()
    }
    return TrainedBlock(weights, before, after)
