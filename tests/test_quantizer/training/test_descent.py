"""Promises of quantizer.training.descent.

Rates, the order of windows, and that training taken up again is training that never stopped.
"""

import pytest
import torch
from torch import Tensor, nn

from quantizer.errors import TrainingError
from quantizer.kernels.precision import fastest_matmul_dtype
from quantizer.plans.fidelity import Fidelity
from quantizer.training.descent import (
    BETAS,
    LAST_RATE,
    WARMUP_STEPS,
    LatentTrainer,
    TrainingSpec,
    window_order,
)
from quantizer.training.latent import LatentLinear
from tests.support.quantized import normal, random_weight

FIDELITY = Fidelity(2, 4, 0.4, 32)


def _layer(fidelity: Fidelity, out_features: int, in_features: int, seed: int) -> LatentLinear:
    stored = random_weight(fidelity, out_features, in_features, seed)
    linear = nn.Linear(in_features, out_features, bias=False)
    linear.weight.data = stored.dequantize() + 0.2 * normal(out_features, in_features, seed=seed)
    return LatentLinear(linear, stored)


def _layers() -> dict[str, LatentLinear]:
    return {f"layer {seed}": _layer(FIDELITY, 8, 64, seed) for seed in (0, 1)}


def _pull(layers: dict[str, LatentLinear], training: LatentTrainer) -> float:
    """Gather gradients that differ from step to step; return the loss."""
    loss = sum(
        (
            _distance(layer.weight(), training.step * 10 + at)
            for at, layer in enumerate(layers.values())
        ),
        torch.zeros(()),
    )
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())


def _distance(weight: Tensor, seed: int) -> Tensor:
    return (weight - normal(*weight.shape, seed=seed)).square().sum()


@pytest.mark.parametrize("trained", ["codes", "scales"])
def test_training_taken_up_again_is_training_that_never_stopped(trained: str) -> None:
    spec = TrainingSpec(8, trained=trained, code_rate=0.05, scale_rate=0.01)
    straight, broken = _layers(), _layers()
    training = LatentTrainer(straight, spec)
    for _ in range(8):
        training.descend(_pull(straight, training))
    first = LatentTrainer(broken, spec)
    for _ in range(5):
        first.descend(_pull(broken, first))
    fresh = _layers()
    second = LatentTrainer(fresh, spec)
    second.loads(first.dumps())
    assert second.step == 5
    for _ in range(3):
        second.descend(_pull(fresh, second))

    assert second.losses == training.losses
    for name, layer in straight.items():
        for part, other in zip(layer.parts, fresh[name].parts, strict=True):
            assert part.latent.equal(other.latent)
            assert part.factor.equal(other.factor)
    assert training.losses[-1] < training.losses[0]


def test_scales_alone_leave_every_code() -> None:
    layers = _layers()
    before = {name: layer.stored().tensors for name, layer in layers.items()}
    training = LatentTrainer(layers, TrainingSpec(30, trained="scales", scale_rate=0.01))
    for _ in range(30):
        training.descend(_pull(layers, training))
    for name, layer in layers.items():
        after = layer.stored().tensors
        for key, tensor in before[name].items():
            assert after[key].equal(tensor) != key.endswith("scales"), key


def test_a_step_is_adams() -> None:
    """One scale of four-bit codes, by the formulas of Adam."""
    layers = {"one": _layer(Fidelity.uniform(4, 32), 1, 32, 0)}
    spec = TrainingSpec(3, code_rate=0.02, scale_rate=0.005)
    training, factor = LatentTrainer(layers, spec), layers["one"].parts[0].factor
    value, mean, square = 1.0, 0.0, 0.0
    for step in range(3):
        _pull(layers, training)
        assert factor.grad is not None
        gradient = float(factor.grad)
        mean, square = (
            BETAS[0] * mean + (1 - BETAS[0]) * gradient,
            BETAS[1] * square + (1 - BETAS[1]) * gradient**2,
        )
        corrected = mean / (1 - BETAS[0] ** (step + 1)), square / (1 - BETAS[1] ** (step + 1))
        value -= (
            spec.scale_rate
            / 4
            * spec.rate_share(step)
            * corrected[0]
            / (corrected[1] ** 0.5 + 1e-8)
        )
        training.descend(0.0)
        assert float(factor.data) == pytest.approx(value, rel=1e-6)


def test_the_first_step_moves_each_code_by_the_rate_of_its_bits() -> None:
    layers = {"one": _layer(Fidelity(2, 4, 0.5, 32), 4, 64, 0)}
    training = LatentTrainer(layers, spec := TrainingSpec(3, code_rate=0.02))
    parts = layers["one"].parts
    before = [part.latent.detach().clone() for part in parts]
    _pull(layers, training)
    within = [part.latent.grad != 0 for part in parts if part.latent.grad is not None]
    training.descend(0.0)
    assert sorted(part.bits for part in parts) == [2, 4]
    for part, old, moved in zip(parts, before, within, strict=True):
        rate = spec.code_rate * spec.rate_share(0) / {2: 1, 4: 4}[part.bits]
        steps = (part.latent.detach() - old).abs()[moved]
        assert moved.any()
        torch.testing.assert_close(steps, torch.full_like(steps, rate), rtol=0.01, atol=1e-7)


def test_rate_rises_then_falls_to_a_rest() -> None:
    spec = TrainingSpec(200)
    shares = [spec.rate_share(step) for step in range(200)]
    peak = shares.index(max(shares))
    assert shares[0] == pytest.approx(1 / WARMUP_STEPS, rel=0.01)
    assert peak == WARMUP_STEPS - 1
    assert shares[:peak] == sorted(shares[:peak])
    assert shares[peak:] == sorted(shares[peak:], reverse=True)
    assert LAST_RATE < shares[-1] < LAST_RATE + 0.01


def test_every_window_is_seen_once_before_any_is_seen_again() -> None:
    order = window_order(10, TrainingSpec(5, batch=4, seed=1))
    seen = order.flatten().tolist()
    assert order.shape == (5, 4)
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert window_order(10, TrainingSpec(5, batch=4, seed=1)).equal(order)
    assert not window_order(10, TrainingSpec(5, batch=4, seed=2)).equal(order)
    assert window_order(3, TrainingSpec(4, batch=5)).shape == (4, 5)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"steps": 0}, "0 steps"),
        ({"batch": 0}, "0 windows"),
        ({"trained": "zeros"}, "'zeros'"),
        ({"code_rate": 0.0}, "rates 0.0"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_refused(values: dict[str, object], told: str) -> None:
    with pytest.raises(TrainingError, match=told):
        TrainingSpec(**{"steps": 1, **values})  # type: ignore[arg-type]


def test_precision_is_one_that_products_can_be_computed_in() -> None:
    assert fastest_matmul_dtype("cuda") == torch.bfloat16
    assert fastest_matmul_dtype("cpu") in (torch.bfloat16, torch.float32)
