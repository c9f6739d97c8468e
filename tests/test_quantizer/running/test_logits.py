"""What is computed of logits in pieces is what it is of all of them at once."""

import pytest
import torch
from torch import Tensor

from quantizer.running import logits as module
from quantizer.running.logits import mean_divergence, token_divergence, token_loss
from tests.support.quantized import normal

TOKENS, VOCABULARY = 23, 37


@pytest.fixture(params=[1, 5, TOKENS], autouse=True)
def _pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a piece have so many tokens."""
    monkeypatch.setattr(module, "_CPU_BYTES", 4 * VOCABULARY * request.param + 3)


def _logits(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return logits of an original and of a model; of the first token they are the same."""
    original, change = 3 * normal(TOKENS, VOCABULARY, seed=1), normal(TOKENS, VOCABULARY, seed=2)
    change[0] = 0
    return original.to(dtype), (original + change).to(dtype)


def _exact(original: Tensor, logits: Tensor) -> Tensor:
    log_q, log_p = original.double().log_softmax(-1), logits.double().log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def test_losses_of_tokens() -> None:
    _, logits = _logits()
    targets = torch.arange(TOKENS) * 7 % VOCABULARY
    found = token_loss(logits, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), -logits.double().log_softmax(-1)[torch.arange(TOKENS), targets]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divergences_of_tokens(dtype: torch.dtype) -> None:
    original, logits = _logits(dtype)
    found, exact = token_divergence(original, logits), _exact(original, logits)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)
    assert abs(float(found[0])) < 1e-6, "the same logits"
    assert exact[1:].min() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mean_and_its_gradient(dtype: torch.dtype) -> None:
    original, logits = _logits(dtype)
    before = original.clone(), logits.clone()
    found, gradient = mean_divergence(original, logits)
    leaf = logits.double().requires_grad_()
    exact = _exact(original, leaf).mean()
    (slope,) = torch.autograd.grad(exact, leaf)
    assert float(found) == pytest.approx(float(exact.detach()), rel=1e-5)
    assert gradient.dtype == dtype
    assert (gradient.double() - slope).norm() < (
        1e-5 if dtype == torch.float32 else 4e-3
    ) * slope.norm()
    assert original.equal(before[0])
    assert logits.equal(before[1])
