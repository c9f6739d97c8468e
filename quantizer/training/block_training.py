"""Train one decoder block against the output of the original block."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from quantizer.kernels.precision import matmul_autocast
from quantizer.modules.linear import get_linear, replace_linear, set_dequantized_weight
from quantizer.packed.weight import QuantizedWeight
from quantizer.running.memory import MicroBatches
from quantizer.running.runner import BlockRunner
from quantizer.training.latent import LatentLinear
from quantizer.training.penalty import Penalty
from quantizer.training.spec import TrainingSpec
from quantizer.training.trained_block import TrainedBlock
from quantizer.training.trainer import LatentTrainer


@dataclass(frozen=True, slots=True)
class BlockTraining:
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
            """Accumulate the gradients of some rows; return their part of the step's loss."""
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
