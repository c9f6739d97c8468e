"""The post-quantization integral as a ranker of single weights, and re-quantization around those that it ranks highest.

Source: PQI and ReQuant, arXiv 2503.01901. A reconstruction where the equations are not public: with
Q the quantized weights, the integral of a weight is |mean of dF/dw on the way from W to Q| * |Q -
W|, and ReQuant keeps two kinds of weights in 16 bits: outliers, the largest weights of each layer,
with a share of the layer in proportion to its mean integral; and significant weights, the largest
integrals of all layers, found in steps, each against what is quantized after the step before.
Departures: F is KL(original || model), which has no noise of labels, and the way has few
Gauss-Legendre nodes instead of 32 equal steps.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantizer.importance.path import move_along_path, path_mean, path_nodes
from quantizer.kernels.precision import matmul_autocast
from quantizer.modules.linear import get_linear
from quantizer.plans.fidelity import OUTLIER_SHARE_LIMIT, RATIO_DIGITS, Fidelity
from quantizer.running.divergence import divergence
from quantizer.running.runner import BlockRunner

Weights = Mapping[str, Tensor]
"""Tensors by layer name, [out, in] each."""

METHOD = "requant-2"
"""Names what this module computes. A change of its results gets a new name."""

NODES, STEPS = 2, 2
_LARGEST_SHARE = 0.9 * OUTLIER_SHARE_LIMIT


@dataclass(frozen=True, slots=True)
class SelectedWeights:
    """Which weights stay in 16 bits.

    Attributes:
        shares: share of each layer's weights.
        scores: by which the layer's weights are chosen: all that are kept score above all others,
            [out, in].
    """

    shares: dict[str, float]
    scores: dict[str, Tensor]

    def fidelity(self, name: str, base: Fidelity) -> Fidelity:
        """Return a layer's fidelity `base` with its share of outliers."""
        return replace(base, outlier_share=self.shares[name])


def weight_integrals(
    runner: BlockRunner,
    originals: Weights,
    quantized: Weights,
    windows: Tensor,
    nodes: int = NODES,
    precision: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Return the signed integral of each weight, mean dF/dw * (Q - w).

    All together add up to the loss that quantization costs.

    Args:
        runner: the model; its weights are put back afterwards.
        originals: the original weights.
        quantized: the quantized ones.
        windows: int64 [windows, tokens] that F is measured on.
        nodes: places on the way at which gradients are taken.
        precision: dtype of the matrix products.

    Returns:
        float32 [out, in] by layer name.
    """
    weights = {name: get_linear(runner.model, name).weight for name in originals}
    with _only(runner, weights), matmul_autocast(precision, windows.device):
        teacher = [runner.final_states(ids) for ids in torch.split(windows, 1)]

        def gradient(point: float) -> dict[str, Tensor]:
            move_along_path(runner.model, originals, quantized, point)
            total = {name: torch.zeros_like(weight.data) for name, weight in weights.items()}
            for ids, original in zip(torch.split(windows, 1), teacher, strict=True):
                states = runner.final_states_with_gradient(ids)
                _, pull = divergence(runner, ids, states.detach(), original)
                each = torch.autograd.grad(
                    states, list(weights.values()), pull.to(states.dtype), allow_unused=True
                )
                for name, own in zip(weights, each, strict=True):
                    if own is not None:
                        total[name].add_(own, alpha=1 / len(windows))
            return total

        means = path_mean(gradient, path_nodes(nodes))
    return {name: mean * (quantized[name] - originals[name]) for name, mean in means.items()}


def select_weights(
    runner: BlockRunner,
    originals: Weights,
    quantized: Weights,
    windows: Tensor,
    share: float,
    precision: torch.dtype = torch.float32,
    steps: int = STEPS,
) -> SelectedWeights:
    """Choose the weights that stay in 16 bits.

    Half of them outliers, half significant weights found in steps.

    Args:
        runner: the original model.
        originals: the original weights.
        quantized: what they were quantized to without any outlier.
        windows: see `weight_integrals`.
        share: share of all weights.
        precision: dtype of the matrix products.
        steps: steps in which significant weights are found.
    """
    size = {name: weight.numel() for name, weight in originals.items()}
    integrals = {
        name: each.abs()
        for name, each in weight_integrals(
            runner, originals, quantized, windows, precision=precision
        ).items()
    }
    kept = {
        name: top_mask(originals[name].abs(), count)
        for name, count in outlier_counts(integrals, share / 2).items()
    }
    current = dict(quantized)
    for step in range(steps):
        for name, mask in kept.items():
            current[name] = torch.where(mask, originals[name], current[name])
        if step:
            found = weight_integrals(runner, originals, current, windows, precision=precision)
            integrals = {name: each.abs() for name, each in found.items()}
        wanted = round(share / 2 / steps * sum(size.values()))
        flat = torch.cat(
            [_open_scores(integrals[name], kept[name]).flatten() for name in integrals]
        )
        chosen = torch.split(top_mask(flat, wanted), [size[name] for name in integrals])
        kept = {
            name: kept[name] | mask.view_as(kept[name])
            for name, mask in zip(integrals, chosen, strict=True)
        }
    shares = {name: _share(int(mask.sum()), size[name]) for name, mask in kept.items()}
    scores = {
        name: integrals[name] + (2 * integrals[name].max() + 1) * mask
        for name, mask in kept.items()
    }
    return SelectedWeights(shares, scores)


def outlier_counts(integrals: Weights, share: float) -> dict[str, int]:
    """Return how many outliers each layer gets.

    A share of its weights in proportion to its mean integral.

    No layer gets more than half of what a fidelity can have; what is over goes to the others, in
    the same proportion.
    """
    size = {name: each.numel() for name, each in integrals.items()}
    means = {name: float(each.double().mean()) for name, each in integrals.items()}
    most = {name: round(_LARGEST_SHARE / 2 * count) for name, count in size.items()}
    counts, left, open_ = (
        dict.fromkeys(size, 0),
        share * sum(size.values()),
        {name for name, mean in means.items() if mean > 0},
    )
    while open_:
        unit = left / sum(means[name] * size[name] for name in open_)
        full = {name for name in open_ if unit * means[name] * size[name] > most[name]}
        if not full:
            return counts | {name: round(unit * means[name] * size[name]) for name in open_}
        counts |= {name: most[name] for name in full}
        left, open_ = max(left - sum(most[name] for name in full), 0.0), open_ - full
    return counts


def top_mask(scores: Tensor, count: int) -> Tensor:
    """Return where the `count` highest scores are; bool, of the same shape."""
    chosen = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    chosen[scores.flatten().topk(min(count, scores.numel())).indices] = True
    return chosen.view_as(scores)


def _open_scores(integrals: Tensor, kept: Tensor) -> Tensor:
    """Return the integrals of weights that may still be kept, -1 for those that are and where a layer has enough."""
    left = int(_LARGEST_SHARE * kept.numel()) - int(kept.sum())
    scores = integrals.masked_fill(kept, -1)
    return scores.masked_fill(~top_mask(scores, left), -1)


def _share(count: int, size: int) -> float:
    return min(max(round(count / size, RATIO_DIGITS), 10.0**-RATIO_DIGITS), _LARGEST_SHARE)


@contextmanager
def _only(runner: BlockRunner, weights: Weights) -> Iterator[None]:
    """Let nothing but the given weights have gradients, and put values and flags back afterwards."""
    needed = {name: parameter.requires_grad for name, parameter in runner.model.named_parameters()}
    values = {name: weight.data for name, weight in weights.items()}
    try:
        for parameter in runner.model.parameters():
            parameter.requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_(True)
        yield
    finally:
        for name, parameter in runner.model.named_parameters():
            parameter.requires_grad_(needed[name])
        for name, weight in weights.items():
            weight.data = values[name]
