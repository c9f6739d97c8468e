"""How quantized layers are trained: steps, learning rates, and the order of windows."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quantizer.errors import TrainingError

TRAINED = ("codes", "scales", "clipping")
"""What may be trained: codes and scales together; scales alone; scales that codes follow.

Adapters are trained with each of them.
"""

WARMUP_STEPS = 20
LAST_RATE = 0.05
"""Share of the full learning rate that is left at the last step."""


@dataclass(frozen=True, slots=True)
class TrainingSpec:
    """How quantized layers are trained.

    Attributes:
        steps: steps of the optimizer.
        batch: windows in one step.
        trained: one of `TRAINED`.
        code_rate: learning rate of latent codes of two bits, in codes; a step of Adam changes a
            code by about as much. It is halved for each further bit.
        scale_rate: learning rate of scales, as a share of the scale of two-bit codes. It is halved
            for each further bit, so that a step moves the largest weights of a group by the same
            number of codes.
        adapter_rate: learning rate of adapters, in their own units; a step of Adam changes a factor
            by about as much.
        precision: dtype of the matrix products; weights, gradients and the optimizer's state are
            float32.
        seed: seed of the order of the windows, and of salient groups chosen at random.
        salient: rule that chooses the groups whose scales are trained, one of
            `quantizer.importance.saliency.RULES`; used by end-to-end training.
        penalty: lambda of the penalty on changes of important weights, see
            `quantizer.training.penalty`; 0 for none. Used by block-wise training.

    Raises:
        TrainingError: a field is out of range.
    """

    steps: int
    batch: int = 4
    trained: str = "codes"
    code_rate: float = 2e-3
    scale_rate: float = 1e-3
    adapter_rate: float = 1e-2
    precision: torch.dtype = torch.float32
    seed: int = 0
    salient: str = "all"
    penalty: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.trained not in TRAINED:
            raise TrainingError(f"trained {self.trained!r}: use one of {', '.join(TRAINED)}")
        if self.steps < 1 or self.batch < 1:
            raise TrainingError(
                f"{self.steps} steps of {self.batch} windows: give at least one of each"
            )
        if self.penalty < 0:
            raise TrainingError(f"penalty {self.penalty}: give 0 for none, or a positive number")
        rates = (self.code_rate, self.scale_rate, self.adapter_rate)
        if min(rates) <= 0:
            raise TrainingError(
                f"learning rates {', '.join(map(str, rates))}: give positive numbers"
            )

    def rate_share(self, step: int) -> float:
        """Return the share of the full learning rate at step 0 .. steps-1.

        It rises linearly during the warm-up, and falls along half a cosine wave.
        """
        falling = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return min(1.0, (step + 1) / WARMUP_STEPS) * (LAST_RATE + (1 - LAST_RATE) * falling)

    def window_order(self, windows: int) -> Tensor:
        """Return the indices of the windows of each step, int64 [steps, batch].

        All windows come once in random order, then all in another random order, and so on.

        Args:
            windows: number of windows.
        """
        generator = torch.Generator().manual_seed(self.seed)
        wanted = self.steps * self.batch
        epochs = [
            torch.randperm(windows, generator=generator) for _ in range(-(-wanted // windows))
        ]
        return torch.cat(epochs)[:wanted].view(self.steps, self.batch)
