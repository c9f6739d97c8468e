"""Promises of quantizer.training.trainer: steps of Adam, and training that continues exactly."""

import pytest
import torch
from torch import Tensor, nn

from quantizer.plans.fidelity import Fidelity
from quantizer.training.latent import LatentLinear
from quantizer.training.spec import TrainingSpec
from quantizer.training.trainer import BETAS, LatentTrainer
from tests.support.quantized import normal, random_weight

FIDELITY = Fidelity(2, 4, 0.4, 32)


def _layer(fidelity: Fidelity, out_features: int, in_features: int, seed: int) -> LatentLinear:
    stored = random_weight(fidelity, out_features, in_features, seed)
    linear = nn.Linear(in_features, out_features, bias=False)
    linear.weight.data = stored.dequantize() + 0.2 * normal(out_features, in_features, seed=seed)
    return LatentLinear(linear, stored)


def _layers() -> dict[str, LatentLinear]:
    return {f"layer {seed}": _layer(FIDELITY, 8, 64, seed) for seed in (0, 1)}


def _accumulate(layers: dict[str, LatentLinear], training: LatentTrainer) -> float:
    """Accumulate gradients that differ from step to step; return the loss."""
    loss = sum(
        (
            _distance(layer.weight(), training.steps_done * 10 + at)
            for at, layer in enumerate(layers.values())
        ),
        torch.zeros(()),
    )
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())


def _distance(weight: Tensor, seed: int) -> Tensor:
    return (weight - normal(*weight.shape, seed=seed)).square().sum()


@pytest.mark.parametrize("trained", ["codes", "scales"])
def test_interrupted_training_continues_exactly(trained: str) -> None:
    spec = TrainingSpec(8, trained=trained, code_rate=0.05, scale_rate=0.01)
    straight, broken = _layers(), _layers()
    training = LatentTrainer(straight, spec)
    for _ in range(8):
        training.step(_accumulate(straight, training))
    first = LatentTrainer(broken, spec)
    for _ in range(5):
        first.step(_accumulate(broken, first))
    fresh = _layers()
    second = LatentTrainer(fresh, spec)
    second.loads(first.dumps())
    assert second.steps_done == 5
    for _ in range(3):
        second.step(_accumulate(fresh, second))

    assert second.losses == training.losses
    for name, layer in straight.items():
        for part, other in zip(layer.parts, fresh[name].parts, strict=True):
            assert part.latent.equal(other.latent)
            assert part.factor.equal(other.factor)
    assert training.losses[-1] < training.losses[0]


def test_scales_alone_leave_every_code() -> None:
    layers = _layers()
    before = {name: layer.quantized().tensors for name, layer in layers.items()}
    training = LatentTrainer(layers, TrainingSpec(30, trained="scales", scale_rate=0.01))
    for _ in range(30):
        training.step(_accumulate(layers, training))
    for name, layer in layers.items():
        after = layer.quantized().tensors
        for key, tensor in before[name].items():
            assert after[key].equal(tensor) != key.endswith("scales"), key


def test_a_step_is_adams() -> None:
    """One scale of four-bit codes, by the formulas of Adam."""
    layers = {"one": _layer(Fidelity.uniform(4, 32), 1, 32, 0)}
    spec = TrainingSpec(3, code_rate=0.02, scale_rate=0.005)
    training = LatentTrainer(layers, spec)
    factor = layers["one"].parts[0].factor
    value = 1.0
    mean = square = 0.0
    for step in range(3):
        _accumulate(layers, training)
        assert factor.grad is not None
        gradient = float(factor.grad)
        mean = BETAS[0] * mean + (1 - BETAS[0]) * gradient
        square = BETAS[1] * square + (1 - BETAS[1]) * gradient**2
        corrected = mean / (1 - BETAS[0] ** (step + 1)), square / (1 - BETAS[1] ** (step + 1))
        value -= (
            spec.scale_rate
            / 4
            * spec.rate_share(step)
            * corrected[0]
            / (corrected[1] ** 0.5 + 1e-8)
        )
        training.step(0.0)
        assert float(factor.data) == pytest.approx(value, rel=1e-6)


def test_the_first_step_moves_each_code_by_the_rate_of_its_bits() -> None:
    layers = {"one": _layer(Fidelity(2, 4, 0.5, 32), 4, 64, 0)}
    training = LatentTrainer(layers, spec := TrainingSpec(3, code_rate=0.02))
    parts = layers["one"].parts
    before = [part.latent.detach().clone() for part in parts]
    _accumulate(layers, training)
    within = [part.latent.grad != 0 for part in parts if part.latent.grad is not None]
    training.step(0.0)
    assert sorted(part.bits for part in parts) == [2, 4]
    for part, old, moved in zip(parts, before, within, strict=True):
        rate = spec.code_rate * spec.rate_share(0) / {2: 1, 4: 4}[part.bits]
        steps = (part.latent.detach() - old).abs()[moved]
        assert moved.any()
        torch.testing.assert_close(steps, torch.full_like(steps, rate), rtol=0.01, atol=1e-7)
