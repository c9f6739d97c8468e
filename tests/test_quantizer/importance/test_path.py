"""Promises of quantizer.importance.path: exact means for polynomials, weights at both ends."""

import pytest
import torch
from torch import Tensor

from quantizer.importance.path import move_along_path, path_mean, path_nodes
from tests.support.quantized import TinyModel, normal


@pytest.mark.parametrize("nodes", [2, 3])
def test_the_mean_of_a_gradient_is_exact_for_polynomials(nodes: int) -> None:
    """A quadratic loss has a linear gradient, of which one node would be enough.

    Two are exact up to a quartic loss.
    """
    start, end = normal(6, seed=1).double(), normal(6, seed=2).double()
    matrix = normal(6, 6, seed=3).double()

    def gradient(point: float) -> dict[str, Tensor]:
        at = start + point * (end - start)
        return {"w": (matrix + matrix.t()) @ at + 4 * at**3}

    def loss(at: Tensor) -> Tensor:
        return at @ matrix @ at + at.pow(4).sum()

    integral = path_mean(gradient, path_nodes(nodes))["w"] * (end - start)
    assert float(integral.sum()) == pytest.approx(float(loss(end) - loss(start)), rel=1e-12)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_nodes_ascend_inside_the_path_and_their_weights_add_up_to_one(count: int) -> None:
    nodes = path_nodes(count)
    points = [node.point for node in nodes]
    assert len(nodes) == count
    assert points == sorted(points)
    assert 0 < points[0] <= points[-1] < 1
    assert sum(node.weight for node in nodes) == pytest.approx(1, rel=1e-12)


def test_weights_move_from_the_original_to_the_quantized_ones(tiny_model: TinyModel) -> None:
    model, name = tiny_model("llama"), "model.layers.1.mlp.up_proj"
    linear = model.get_submodule(name)
    original = linear.weight.data.clone()
    quantized = (original / 0.1).round() * 0.1
    for point, expected in ((0, original), (1, quantized), (0.5, (original + quantized) / 2)):
        move_along_path(model, {name: original}, {name: quantized}, point)
        assert torch.allclose(linear.weight.data, expected, atol=1e-7)
    assert (
        linear.weight.requires_grad == tiny_model("llama").get_submodule(name).weight.requires_grad
    )
