"""Which groups of columns are salient, for training the scales of these groups alone.

A reconstruction of SGR-Q, whose text is not public: coarse quantization, then column scores by the
"sparsity Hessian", then training of the salient columns' scales with everything else frozen. Here a
scale belongs to a group of columns. So groups are chosen, and the score of a group is the sum of
its columns' scores (`quantizer.rounding.columns.sparsity_impact`).
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from quantizer.errors import TrainingError
from quantizer.modules.linear import get_linear
from quantizer.packed.layout import COLUMNS, named_parts
from quantizer.packed.weight import QuantizedWeight
from quantizer.plans.plan import LayerSpec, by_block
from quantizer.rounding.columns import knee, sparsity_impact
from quantizer.running.block_inputs import BlockInputs
from quantizer.running.moments import Calibration
from quantizer.running.runner import BlockRunner
from quantizer.running.waves import measure_wave, waves

RULES = ("all", "knee", "top40", "random40")
"""Rules by which the salient groups of a layer are chosen.

All groups; those before the knee of the layer's cumulative scores; the two fifths of the highest
scores; two fifths at random.
"""

_SHARE = 0.4


def salient_groups(
    scores: Tensor, quantized: QuantizedWeight, rule: str, seed: int = 0
) -> list[Tensor]:
    """Return which groups of a layer are salient.

    Args:
        scores: score of each input column, in the order of the original weight, [in].
        quantized: the quantized layer.
        rule: one of `RULES`.
        seed: seed of the random choice.

    Returns:
        bool [groups] for each part of the layer, in stored order.

    Raises:
        TrainingError: the rule does not exist.
    """
    if rule not in RULES:
        raise TrainingError(f"salient groups by {rule!r}: use one of {', '.join(RULES)}")
    group_scores = _group_scores(scores, quantized)
    counts = [len(part) for part in group_scores]
    totals = torch.cat(group_scores)
    if rule == "random40":
        generator = torch.Generator().manual_seed(seed)
        totals = torch.rand(len(totals), generator=generator).to(totals.device)
    wanted = {"all": len(totals), "knee": knee(totals)}.get(rule, math.ceil(_SHARE * len(totals)))
    salient = torch.zeros(len(totals), dtype=torch.bool, device=totals.device)
    salient[totals.argsort(descending=True, stable=True)[:wanted]] = True
    return list(torch.split(salient, counts))


def _group_scores(scores: Tensor, quantized: QuantizedWeight) -> list[Tensor]:
    """Return the sum of the column scores of each group, [groups] for each part in stored order."""
    order = quantized.tensors[COLUMNS].to(torch.int64).to(scores.device)
    ordered = scores[order]
    sums = []
    start = 0
    for _, columns, _ in named_parts(quantized.fidelity, quantized.in_features):
        part = ordered[start : start + columns]
        groups = torch.split(part, quantized.fidelity.group_size)
        sums.append(torch.stack([group.sum() for group in groups]))
        start += columns
    return sums


def column_scores(
    runner: BlockRunner, layers: Sequence[LayerSpec], calibration: Calibration
) -> dict[str, Tensor]:
    """Return the sparsity impact of each layer's columns in the original model.

    Returns:
        float32 [in] by layer name.
    """
    batches = calibration.batches()
    members = by_block(layers)
    hidden = [runner.initial_states(batch) for batch in batches]
    scores = {}
    for index in range(len(runner.blocks)):
        inputs = BlockInputs(runner, index, batches, hidden)
        for wave in waves(inputs, members.get(index, ())):
            for measured in measure_wave(inputs, wave):
                for layer in measured.group:
                    weight = get_linear(runner.model, layer.name).weight.data.float()
                    scores[layer.name] = sparsity_impact(weight, measured.matrix)
        hidden = runner.advance(batches, hidden, index)
    return scores


def find_salient_groups(
    runner: BlockRunner,
    layers: Sequence[LayerSpec],
    quantized: Mapping[str, QuantizedWeight],
    calibration: Calibration,
    rule: str,
    seed: int,
) -> dict[str, list[Tensor]] | None:
    """Return the salient groups of all layers by name, see `salient_groups`.

    Returns:
        None under the rule `all`, which needs no scores.
    """
    if rule == "all":
        return None
    scores = column_scores(runner, layers, calibration)
    return {
        layer.name: salient_groups(scores[layer.name], quantized[layer.name], rule, seed + at)
        for at, layer in enumerate(layers)
    }
