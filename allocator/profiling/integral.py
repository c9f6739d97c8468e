"""The `integral` signal.

Each layer's share of the damage, by integrating the gradient from the original to the quantized
weights.

With W the original weights, E = context - W, and KL the divergence from the original,

    share_l = integral over t in [0, 1] of <dKL/dW_l (W + t E), E_l> dt

is layer l's part of the damage that all layers do together: the shares add up to the context's KL
exactly, so what layers do to each other is in them (this is the attribution of Aumann and Shapley;
for single weights, the post-quantization integral of arXiv 2503.01901, section 3). The integral is
taken at a few Gauss-Legendre nodes. As the errors of different fidelities point in directions that
know nothing of each other, a share goes with the squared size of its error: at fidelity k

    damage[l, k] = share_l * (output_error[l, k] / output_error[l, context] - 1).

Cost: one forward and one backward pass over the probes for each node, whatever the number of layers
and fidelities.
"""

import numpy as np
import torch
from torch import Tensor

from allocator.profile import Array
from allocator.profiling.backward import inner_products
from allocator.profiling.signal import LossModel, Scene, additive, context_loss, kept
from allocator.signals import INTEGRAL_NODES
from quantizer.modules.linear import get_linear
from quantizer.running.divergence import divergence
from quantizer.running.memory import MicroBatches

STABLE = 0.98
"""Probing ends early once the shares of the odd and of the even batches correlate this much."""
_FEWEST_BATCHES = 4


def integral(scene: Scene, nodes: int = INTEGRAL_NODES) -> LossModel:
    """Return the additive loss model of the module's formula."""
    shares, loss = layer_shares(scene, nodes)
    return additive(
        loss.mean(), damages(shares.mean(0), scene), shares.shape[0] * scene.spec.probes.shape[1]
    )


def damages(share: Array, scene: Scene) -> Array:
    """Return damage [L, K] of shares [L].

    A layer whose context has no error is taken to have none at any fidelity.
    """
    here = scene.output_error[:, [scene.menu.context]]
    ratio = np.divide(
        scene.output_error, here, out=np.ones_like(scene.output_error), where=here > 0
    )
    return np.asarray(share[:, None] * (ratio - 1), dtype=np.float64)


def layer_shares(scene: Scene, nodes: int = INTEGRAL_NODES) -> tuple[Array, Array]:
    """Return (shares [windows, L], KL of the context [windows]) in [nats/token], of the probe windows that were used.

    Batches are taken in order. At the node nearest to the context, probing ends when all are used
    or, tested after every second one, the mean shares of every second batch agree with those of the
    others, see `STABLE`; other nodes use the same batches.
    """
    batches = torch.split(scene.spec.probes, scene.spec.batch)
    originals = torch.split(scene.original_states, scene.spec.batch)
    points, weights = np.polynomial.legendre.leggauss(nodes)
    total, steps, used, micro_batches = (
        np.zeros(()),
        len(batches) * nodes,
        len(batches),
        MicroBatches(),
    )
    for turn, node in enumerate(np.argsort(-points)):
        point = float(points[node] + 1) / 2
        _go_along_path(scene, point)
        shares: list[Array] = []
        for index in range(used):
            shares.append(
                _batch_shares(
                    scene,
                    f"shares-{node}-{index:04d}",
                    batches[index],
                    originals[index],
                    point,
                    micro_batches,
                )
            )
            scene.on_progress(turn * len(batches) + index + 1, steps)
            if turn == 0 and _agree(shares):
                used = index + 1
                break
        total = total + float(weights[node]) / 2 * np.concatenate(shares)
    scene.put_all(scene.menu.fidelities[scene.menu.context])
    losses = [
        context_loss(scene, f"loss-{index:04d}", batches[index], originals[index])
        for index in range(used)
    ]
    scene.on_progress(steps, steps)
    return np.asarray(total, dtype=np.float64), np.concatenate(losses)


def _agree(shares: list[Array]) -> bool:
    if len(shares) < _FEWEST_BATCHES or len(shares) % 2:
        return False
    halves = [np.concatenate(shares[start::2]).mean(0) for start in (0, 1)]
    if any(half.std() == 0 for half in halves):
        return False
    return bool(np.corrcoef(halves)[0, 1] >= STABLE)


def _go_along_path(scene: Scene, point: float) -> None:
    """Put the weights at `point` of the way from the original to the context."""
    scene.put_all(scene.menu.fidelities[scene.menu.context])
    for layer in scene.layers:
        linear, original = get_linear(scene.runner.model, layer.name), scene.originals[layer.name]
        linear.weight.data = torch.lerp(original, linear.weight.data, point)


def _batch_shares(
    scene: Scene,
    part: str,
    batch: Tensor,
    original: Tensor,
    point: float,
    micro_batches: MicroBatches,
) -> Array:
    """Return <dKL/dW, E> of each window and layer at a point of the path, [windows, L]."""
    runner = scene.runner

    def error(name: str) -> tuple[Tensor]:
        return ((get_linear(runner.model, name).weight.data - scene.originals[name]) / point,)

    def products(some: slice) -> Tensor:
        gradient = lambda states: divergence(runner, batch[some], states, original[some])[1]  # noqa: E731
        return inner_products(runner, batch[some], gradient, scene.layers, 1, error)

    found = kept(scene.parts, part, lambda: {"products": micro_batches.cat(products, len(batch))})[
        "products"
    ]
    return np.asarray(found[:, :, 0].numpy(), dtype=np.float64)
