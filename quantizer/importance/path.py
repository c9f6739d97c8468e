"""The straight path from the original to the quantized weights, and means of gradients along it.

The mean of dF/dw over the path, times the change of w, is the part of the change of F that w
accounts for: the parts of all weights add up to the whole change (Aumann and Shapley; for single
weights arXiv 2503.01901, section 3).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantizer.modules.linear import get_linear


@dataclass(frozen=True, slots=True)
class PathNode:
    """A point of the path at which gradients are taken.

    Attributes:
        point: share of the way from the original weights, 0, to the quantized ones, 1.
        weight: weight of the gradient in the mean; the weights of all nodes add up to 1.
    """

    point: float
    weight: float


def path_nodes(count: int) -> tuple[PathNode, ...]:
    """Return the nodes of the Gauss-Legendre quadrature on [0, 1], in ascending order.

    The weighted mean over `count` nodes is exact for polynomials of degree 2 count - 1.
    """
    points, weights = np.polynomial.legendre.leggauss(count)
    return tuple(
        PathNode(float(point + 1) / 2, float(weight) / 2)
        for point, weight in zip(points, weights, strict=True)
    )


def path_mean(
    gradient: Callable[[float], dict[str, Tensor]], nodes: tuple[PathNode, ...]
) -> dict[str, Tensor]:
    """Return the mean over the path of the gradients by layer name that `gradient` gives."""
    total: dict[str, Tensor] = {}
    for node in nodes:
        for name, each in gradient(node.point).items():
            if name in total:
                total[name].add_(each, alpha=node.weight)
            else:
                total[name] = each * node.weight
    return total


def move_along_path(
    model: Any, originals: Mapping[str, Tensor], quantized: Mapping[str, Tensor], point: float
) -> None:
    """Set the weights of some layers to W + point * (Q - W).

    Args:
        model: the model whose layers are changed.
        originals: the original weights W by layer name, [out, in].
        quantized: the quantized weights Q by layer name, of the same shapes.
        point: share of the way from W to Q.
    """
    for name, original in originals.items():
        get_linear(model, name).weight.data = torch.lerp(original, quantized[name], point)
