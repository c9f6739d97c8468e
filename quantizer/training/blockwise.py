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
from collections.abc import Mapping

import torch
from torch import Tensor

from quantizer.durable import PartStore, Progress
from quantizer.importance.fisher import squared_gradients
from quantizer.modules.linear import set_dequantized_weight
from quantizer.packed.weight import QuantizedWeight
from quantizer.plans.plan import by_block
from quantizer.running.runner import BlockRunner
from quantizer.structure.blocks import find_layers
from quantizer.training.block_training import BlockTraining
from quantizer.training.penalty import Penalty
from quantizer.training.spec import TrainingSpec
from quantizer.training.trained_block import TrainedBlock, decode, encode

log = logging.getLogger("bitwright")

METHOD = "blockwise-3"
"""Identifies what this module and those that it uses for training compute.

It is part of the keys of stored results: a change of the results needs a new name.
"""

PENALTY_WINDOWS = 32
"""Windows on which the importance of weights is measured for the penalty."""


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
            block = BlockTraining(runner, index, spec, windows, inputs, targets)
            trained = block.train(own, penalty)
            parts.write(part, encode(trained))
        else:
            trained = decode(data, own)
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
