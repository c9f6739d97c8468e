"""The weights that stay in 16 bits, chosen by the post-quantization integral.

Source: ReQuant, arXiv 2503.01901. A reconstruction where the equations are not public. Two kinds of
weights stay in 16 bits:

* outliers: the largest weights of each layer; a layer's share of outliers is in proportion to the
  mean |integral| of its weights;
* significant weights: the weights of the largest |integral| in all layers, found in rounds. Each
  round measures the integrals of the model as the rounds before left it.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantizer.importance.integrals import Weights, weight_integrals
from quantizer.plans.fidelity import OUTLIER_SHARE_LIMIT, RATIO_DIGITS, Fidelity
from quantizer.running.runner import BlockRunner

METHOD = "requant-2"
"""Identifies what this module computes.

It is part of the keys of stored results: a change of the results needs a new name.
"""

ROUNDS = 2
_LARGEST_SHARE = 0.9 * OUTLIER_SHARE_LIMIT


@dataclass(frozen=True, slots=True)
class SelectedWeights:
    """Which weights stay in 16 bits.

    Attributes:
        shares: share of each layer's weights that stay, by layer name.
        scores: scores that select them, [out, in] by layer name: every weight that stays has a
            higher score than any other weight of its layer.
    """

    shares: dict[str, float]
    scores: dict[str, Tensor]

    def fidelity(self, name: str, base: Fidelity) -> Fidelity:
        """Return the fidelity `base` with the outlier share of the layer `name`."""
        return replace(base, outlier_share=self.shares[name])


def select_weights(
    runner: BlockRunner,
    originals: Weights,
    quantized: Weights,
    windows: Tensor,
    share: float,
    rounds: int = ROUNDS,
) -> SelectedWeights:
    """Choose the weights that stay in 16 bits: half of them outliers, half significant weights.

    Args:
        runner: the original model.
        originals: the original weights.
        quantized: the weights after quantization without outliers.
        windows: token ids on which integrals are measured, int64 [windows, tokens].
        share: share of all weights that stay.
        rounds: rounds in which significant weights are found.
    """
    sizes = {name: weight.numel() for name, weight in originals.items()}
    in_a_round = round(share / 2 / rounds * sum(sizes.values()))
    integrals = _magnitudes(runner, originals, quantized, windows)
    chosen = {
        name: top_mask(originals[name].abs(), count)
        for name, count in outlier_counts(integrals, share / 2).items()
    }
    current = dict(quantized)
    for index in range(rounds):
        for name, mask in chosen.items():
            current[name] = torch.where(mask, originals[name], current[name])
        if index > 0:
            integrals = _magnitudes(runner, originals, current, windows)
        significant = _largest(integrals, chosen, in_a_round)
        chosen = {name: mask | significant[name] for name, mask in chosen.items()}
    shares = {name: _share(int(mask.sum()), sizes[name]) for name, mask in chosen.items()}
    scores = {
        name: integrals[name] + (2 * integrals[name].max() + 1) * mask
        for name, mask in chosen.items()
    }
    return SelectedWeights(shares, scores)


def _magnitudes(
    runner: BlockRunner, originals: Weights, quantized: Weights, windows: Tensor
) -> dict[str, Tensor]:
    integrals = weight_integrals(runner, originals, quantized, windows)
    return {name: each.abs() for name, each in integrals.items()}


def _largest(integrals: Weights, chosen: Weights, count: int) -> dict[str, Tensor]:
    """Return where the `count` largest integrals of weights not yet chosen are, by layer name."""
    scores = [_open_scores(each, chosen[name]).flatten() for name, each in integrals.items()]
    mask = top_mask(torch.cat(scores), count)
    masks = torch.split(mask, [each.numel() for each in scores])
    return {name: each.view_as(chosen[name]) for name, each in zip(integrals, masks, strict=True)}


def _open_scores(integrals: Tensor, chosen: Tensor) -> Tensor:
    """Return the integrals of weights that may be chosen, and -1 for all others.

    A weight may not be chosen twice, nor one more than a layer may have outliers.
    """
    left = int(_LARGEST_SHARE * chosen.numel()) - int(chosen.sum())
    scores = integrals.masked_fill(chosen, -1)
    return scores.masked_fill(~top_mask(scores, left), -1)


def outlier_counts(integrals: Weights, share: float) -> dict[str, int]:
    """Return how many outliers each layer gets.

    A layer's share of outliers is in proportion to the mean integral of its weights. No layer gets
    more than half of what a fidelity can have; the remainder goes to the other layers, in the same
    proportion.

    Args:
        integrals: |integral| of each weight by layer name.
        share: outliers as a share of all weights.
    """
    sizes = {name: each.numel() for name, each in integrals.items()}
    means = {name: float(each.double().mean()) for name, each in integrals.items()}
    limits = {name: round(_LARGEST_SHARE / 2 * size) for name, size in sizes.items()}
    counts = dict.fromkeys(sizes, 0)
    left = share * sum(sizes.values())
    below_limit = {name for name, mean in means.items() if mean > 0}
    while below_limit:
        unit = left / sum(means[name] * sizes[name] for name in below_limit)
        demands = {name: unit * means[name] * sizes[name] for name in below_limit}
        full = {name for name, demand in demands.items() if demand > limits[name]}
        if not full:
            return counts | {name: round(demand) for name, demand in demands.items()}
        counts |= {name: limits[name] for name in full}
        left = max(left - sum(limits[name] for name in full), 0.0)
        below_limit -= full
    return counts


def top_mask(scores: Tensor, count: int) -> Tensor:
    """Return where the `count` highest scores are, bool of the same shape."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[scores.flatten().topk(min(count, scores.numel())).indices] = True
    return mask.view_as(scores)


def _share(count: int, size: int) -> float:
    return min(max(round(count / size, RATIO_DIGITS), 10.0**-RATIO_DIGITS), _LARGEST_SHARE)
