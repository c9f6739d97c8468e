"""Steps of gradient descent on the codes and scales of quantized layers, which can be stopped and taken up again."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from quantizer.errors import TrainingError
from quantizer.training.latent import LatentLinear, LatentPart

TRAINED = ("codes", "scales", "clipping")
"""What may be trained: codes and scales together; scales alone; scales that codes follow.

Adapters are trained with each.
"""

WARMUP_STEPS = 20
LAST_RATE = 0.05
"""Share of the full rate that is left at the last step."""
BETAS = (0.9, 0.95)
_RATE_BITS = 2


@dataclass(frozen=True, slots=True)
class TrainingSpec:
    """How quantized layers are trained.

    Attributes:
        steps: steps of the optimizer.
        batch: windows that one step sees.
        trained: one of `TRAINED`.
        code_rate: learning rate of latent codes of two bits, in codes, about what one step of Adam
            changes; half as much for each further bit.
        scale_rate: learning rate of scales, as a share of the scale of two-bit codes, and half as
            much for each further bit: so it moves the largest weights of a group by as many codes.
        adapter_rate: learning rate of adapters, in their own units; about what one step of Adam
            changes.
        precision: dtype of the matrix products; weights, gradients and the optimizer's state are
            float32.
        seed: of the order of the windows.
        salient: which groups' scales are trained, one of `quantizer.importance.saliency.RULES`.
        penalty: lambda of the price on moving weights that matter, see
            `quantizer.training.blockwise.Penalty`; 0 for none.

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
        """Refuse what cannot be trained."""
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

        A linear warm-up, then half a cosine wave.
        """
        falling = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return min(1.0, (step + 1) / WARMUP_STEPS) * (LAST_RATE + (1 - LAST_RATE) * falling)


def window_order(windows: int, spec: TrainingSpec) -> Tensor:
    """Return which windows each step sees, int64 [steps, batch].

    All windows in random order, then all in another order, ...
    """
    generator = torch.Generator().manual_seed(spec.seed)
    wanted = spec.steps * spec.batch
    epochs = [torch.randperm(windows, generator=generator) for _ in range(-(-wanted // windows))]
    return torch.cat(epochs)[:wanted].view(spec.steps, spec.batch)


class LatentTrainer:
    """Adam on the codes and scales of some layers (arXiv 1412.6980), with its own state kept for a later run.

    Attributes:
        losses: loss at each step that was taken.
    """

    def __init__(
        self,
        layers: Mapping[str, LatentLinear],
        spec: TrainingSpec,
        salient: Mapping[str, Sequence[Tensor]] | None = None,
    ) -> None:
        """Set up the optimizer; no other parameter of the layers is touched.

        Args:
            layers: the layers by name.
            spec: how they are trained.
            salient: groups whose scales are trained, bool [groups] of each part by layer name; None
                for all of them.
        """
        self.losses: list[float] = []
        self._spec = spec
        parts: dict[str, LatentPart] = {
            f"{name}.{index}": part
            for name, layer in layers.items()
            for index, part in enumerate(layer.parts)
        }
        self._trained = {f"{name}.factor": part.factor for name, part in parts.items()}
        rates = {
            f"{name}.factor": spec.scale_rate * _share(part.bits) for name, part in parts.items()
        }
        if spec.trained == "codes":
            self._trained |= {f"{name}.latent": part.latent for name, part in parts.items()}
            rates |= {
                f"{name}.latent": spec.code_rate * _share(part.bits) for name, part in parts.items()
            }
        else:
            for part in parts.values():
                part.latent.requires_grad_(False)
        adapters = {
            f"{name}.{kind}": factor
            for name, layer in layers.items()
            for kind, factor in layer.adapters().items()
        }
        self._trained |= adapters
        rates |= dict.fromkeys(adapters, spec.adapter_rate)
        for name, chosen in (salient or {}).items():
            for part, mask in zip(layers[name].parts, chosen, strict=True):
                _freeze(part.factor, ~mask)
        self._optimizer = torch.optim.Adam(
            self._groups(rates), lr=spec.scale_rate, betas=BETAS, fused=True
        )

    def _groups(self, rates: Mapping[str, float]) -> list[dict[str, Any]]:
        """Return the optimizer's groups, one for each learning rate.

        Each group is launches of its own.
        """
        groups: dict[float, list[nn.Parameter]] = defaultdict(list)
        for name, rate in rates.items():
            groups[rate].append(self._trained[name])
        return [{"params": parameters, "full": rate} for rate, parameters in groups.items()]

    @property
    def step(self) -> int:
        """Steps taken."""
        return len(self.losses)

    def descend(self, loss: float) -> None:
        """Take one step along the gradients that have been gathered, and forget them.

        `loss` is what they belong to.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = group["full"] * self._spec.rate_share(self.step)
        self._optimizer.step()
        self.forget()
        self.losses.append(loss)

    def forget(self) -> None:
        """Drop the gradients that have been gathered."""
        self._optimizer.zero_grad()

    def dumps(self) -> bytes:
        """Return all that a later run needs to go on from here."""
        tensors = {"losses": torch.tensor(self.losses, dtype=torch.float64)}
        for name, parameter in self._trained.items():
            tensors[f"{name}|value"] = parameter.data
            tensors |= {
                f"{name}|{key}": value for key, value in self._optimizer.state[parameter].items()
            }
        data: bytes = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
        return data

    def loads(self, data: bytes) -> None:
        """Go on from what `dumps` returned, in training of the same layers by the same specification."""
        tensors = load(data)
        self.losses = tensors["losses"].tolist()
        for name, parameter in self._trained.items():
            own = {
                key.removeprefix(f"{name}|"): tensor
                for key, tensor in tensors.items()
                if key.startswith(f"{name}|")
            }
            parameter.data.copy_(own.pop("value"))
            self._optimizer.state[parameter] = {
                key: tensor.to(parameter.device) for key, tensor in own.items()
            }


def _share(bits: int) -> float:
    """Return the share of the rates of two-bit codes at which codes of some bits, and their scales, are trained."""
    return 2.0 ** (_RATE_BITS - bits)


def _freeze(factor: nn.Parameter, groups: Tensor) -> None:
    """Let the scales of some groups, bool [groups], have no gradient."""
    frozen = groups.to(factor.device).view(1, -1, 1)
    factor.register_hook(lambda gradient: gradient.masked_fill(frozen, 0))  # type: ignore[no-untyped-call]
