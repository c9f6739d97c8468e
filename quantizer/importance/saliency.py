"""Which groups of columns are salient, for training the scales of those alone.

A reconstruction of SGR-Q, whose text is not public: coarse quantization, then column scores by the
sparsity Hessian, then training of the salient columns' scales with all else frozen. Here a scale
belongs to a group of columns, so a group's score is the sum of its columns' scores
(`quantizer.rounding.columns.sparsity_impact`), and groups are what is chosen.
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
from quantizer.running.moments import Calibration, input_groups, input_moments
from quantizer.running.runner import BlockRunner

RULES = ("all", "knee", "top40", "random40")
"""All groups; those before the knee of the layer's cumulative scores.

Two fifths of the highest scores; two fifths at random.
"""

_SHARE = 0.4


def salient_groups(
    scores: Tensor, stored: QuantizedWeight, rule: str, seed: int = 0
) -> list[Tensor]:
    """Return which groups of a layer are salient.

    Args:
        scores: of input columns, in the layer's own order, [in].
        stored: the layer's stored form.
        rule: one of `RULES`.
        seed: of what is random.

    Returns:
        bool [groups] of each part, in stored order.

    Raises:
        TrainingError: there is no such rule.
    """
    if rule not in RULES:
        raise TrainingError(f"salient groups by {rule!r}: use one of {', '.join(RULES)}")
    ordered, size = (
        scores[stored.tensors[COLUMNS].to(torch.int64).to(scores.device)],
        stored.fidelity.group_size,
    )
    sums, counts, start = [], [], 0
    for _, columns, _ in named_parts(stored.fidelity, stored.in_features):
        groups = torch.split(ordered[start : start + columns], size)
        sums += [group.sum() for group in groups]
        counts.append(len(groups))
        start += columns
    totals = torch.stack(sums)
    if rule == "random40":
        totals = torch.rand(len(totals), generator=torch.Generator().manual_seed(seed)).to(
            totals.device
        )
    wanted = {"all": len(totals), "knee": knee(totals)}.get(rule, math.ceil(_SHARE * len(totals)))
    chosen = torch.zeros(len(totals), dtype=torch.bool, device=totals.device)
    chosen[totals.argsort(descending=True, stable=True)[:wanted]] = True
    return list(torch.split(chosen, counts))


def column_scores(
    runner: BlockRunner, layers: Sequence[LayerSpec], calibration: Calibration
) -> dict[str, Tensor]:
    """Return the sparsity impact of each layer's columns in the original model, float32 [in] by layer name."""
    batches = calibration.batches()
    members = by_block(layers)
    hidden = [runner.initial_states(batch) for batch in batches]
    scores = {}
    for index in range(len(runner.blocks)):
        for group in input_groups(runner, members.get(index, ()), batches[0], hidden[0], index):
            moments = input_moments(runner, group[0], batches, hidden, index)
            for layer in group:
                scores[layer.name] = sparsity_impact(
                    get_linear(runner.model, layer.name).weight.data.float(), moments
                )
        hidden = runner.advance(batches, hidden, index)
    return scores


def find_salient_groups(
    runner: BlockRunner,
    layers: Sequence[LayerSpec],
    stored: Mapping[str, QuantizedWeight],
    calibration: Calibration,
    rule: str,
    seed: int,
) -> dict[str, list[Tensor]] | None:
    """Return the salient groups of all layers by name, or None where they are all of them, which takes no work to find."""
    if rule == "all":
        return None
    scores = column_scores(runner, layers, calibration)
    return {
        layer.name: salient_groups(scores[layer.name], stored[layer.name], rule, seed + at)
        for at, layer in enumerate(layers)
    }
