"""Losses at the head, and their gradients, are those of the full logits."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from quantizer.running.divergence import cross_entropy_gradient, divergence
from quantizer.running.runner import BlockRunner
from tests.support.profiled_models import make_loader, windows

IDS = windows(3, 24, 2)


@dataclass(frozen=True)
class Head:
    """A model's head, what enters it originally, and what enters it after a change."""

    runner: BlockRunner
    original: Tensor
    changed: Tensor

    def log_probs(self, states: Tensor) -> Tensor:
        """Return log-probabilities by the head, float64 [windows, tokens, vocabulary]."""
        return torch.nn.functional.linear(
            states.double(), self.runner.head.weight.double()
        ).log_softmax(-1)


@pytest.fixture(scope="module", params=["llama", "opt", "gemma3", "gpt_neox"])
def head(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Head:
    runner = BlockRunner(make_loader(tmp_path_factory.mktemp("divergence"), request.param)())
    original = runner.final_states(IDS)
    noise = torch.randn(original.shape, generator=torch.Generator().manual_seed(3))
    return Head(runner, original, original + 0.3 * original.std() * noise)


def test_divergence_and_its_gradient_are_those_of_the_full_logits(head: Head) -> None:
    losses, gradient = divergence(head.runner, IDS, head.changed, head.original)
    leaf, log_q = head.changed.clone().requires_grad_(), head.log_probs(head.original)
    exact = (log_q.exp() * (log_q - head.log_probs(leaf))).sum(-1).mean(-1)
    assert exact.min() > 0.01
    torch.testing.assert_close(losses.double(), exact.detach(), rtol=1e-4, atol=1e-7)
    (slope,) = torch.autograd.grad(
        exact.sum(), leaf
    )  # a window's loss depends on its own states only
    assert (gradient - slope).norm() < 1e-4 * slope.norm()


def test_the_original_has_no_divergence_and_no_slope(head: Head) -> None:
    losses, gradient = divergence(head.runner, IDS, head.original, head.original)
    assert losses.abs().max() < 1e-6
    assert gradient.abs().max() < 1e-6


def test_the_cross_entropy_gradient_is_that_of_each_window_s_next_tokens(head: Head) -> None:
    gradient = cross_entropy_gradient(head.runner, IDS, head.changed)
    leaf = head.changed.clone().requires_grad_()
    log_p = head.log_probs(leaf)
    losses = [
        -sum(log_p[window, at, int(IDS[window, at + 1])] for at in range(IDS.shape[1] - 1))
        / (IDS.shape[1] - 1)
        for window in range(len(IDS))
    ]
    (slope,) = torch.autograd.grad(sum(losses), leaf)
    assert (gradient - slope).norm() < 1e-4 * slope.norm()
    assert not gradient[:, -1].any()  # the last token has no next one
