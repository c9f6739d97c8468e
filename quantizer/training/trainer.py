"""Gradient descent on the codes and scales of quantized layers, which can be interrupted."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from quantizer.training.latent import LatentLinear
from quantizer.training.spec import TrainingSpec

BETAS = (0.9, 0.95)
_FULL_RATE_BITS = 2
"""Code width that is trained at the full learning rate."""


@dataclass(frozen=True, slots=True)
class _Trained:
    """A parameter that is trained, and its full learning rate."""

    parameter: nn.Parameter
    rate: float


class LatentTrainer:
    """Adam on the codes and scales of some layers (arXiv 1412.6980).

    Attributes:
        losses: loss of each step so far.
    """

    def __init__(
        self,
        layers: Mapping[str, LatentLinear],
        spec: TrainingSpec,
        salient: Mapping[str, Sequence[Tensor]] | None = None,
    ) -> None:
        """Set up the optimizer; other parameters of the layers stay as they are.

        Args:
            layers: the layers by name.
            spec: how they are trained.
            salient: groups whose scales are trained, bool [groups] for each part by layer name;
                None for all groups.
        """
        self.losses: list[float] = []
        self._spec = spec
        self._trained = _trained_parameters(layers, spec)
        for name, masks in (salient or {}).items():
            for part, mask in zip(layers[name].parts, masks, strict=True):
                _freeze(part.factor, ~mask)
        self._optimizer = torch.optim.Adam(
            self._groups(), lr=spec.scale_rate, betas=BETAS, fused=True
        )

    def _groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups, one for each learning rate.

        There are as few as possible, because the optimizer launches kernels for each group.
        """
        groups: dict[float, list[nn.Parameter]] = defaultdict(list)
        for trained in self._trained.values():
            groups[trained.rate].append(trained.parameter)
        return [{"params": parameters, "full_rate": rate} for rate, parameters in groups.items()]

    @property
    def steps_done(self) -> int:
        """Number of steps so far."""
        return len(self.losses)

    def step(self, loss: float) -> None:
        """Take one step along the accumulated gradients, and discard them.

        Args:
            loss: the loss whose gradients they are.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = group["full_rate"] * self._spec.rate_share(self.steps_done)
        self._optimizer.step()
        self.zero_grad()
        self.losses.append(loss)

    def zero_grad(self) -> None:
        """Discard the accumulated gradients."""
        self._optimizer.zero_grad()

    def dumps(self) -> bytes:
        """Return the state from which `loads` continues: parameters, moments and losses."""
        tensors = {"losses": torch.tensor(self.losses, dtype=torch.float64)}
        for name, trained in self._trained.items():
            tensors[f"{name}|value"] = trained.parameter.data
            state = self._optimizer.state[trained.parameter]
            tensors |= {f"{name}|{key}": value for key, value in state.items()}
        data: bytes = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
        return data

    def loads(self, data: bytes) -> None:
        """Continue from what `dumps` returned, for the same layers and the same specification."""
        tensors = load(data)
        self.losses = tensors["losses"].tolist()
        for name, trained in self._trained.items():
            parameter = trained.parameter
            own = {
                key.removeprefix(f"{name}|"): tensor
                for key, tensor in tensors.items()
                if key.startswith(f"{name}|")
            }
            parameter.data.copy_(own.pop("value"))
            self._optimizer.state[parameter] = {
                key: tensor.to(parameter.device) for key, tensor in own.items()
            }


def _trained_parameters(
    layers: Mapping[str, LatentLinear], spec: TrainingSpec
) -> dict[str, _Trained]:
    """Return the parameters that are trained, by name; other latent codes get no gradient."""
    parts = {
        f"{name}.{index}": part
        for name, layer in layers.items()
        for index, part in enumerate(layer.parts)
    }
    trained = {}
    for name, part in parts.items():
        share = _rate_share(part.bits)
        trained[f"{name}.factor"] = _Trained(part.factor, spec.scale_rate * share)
        if spec.trained == "codes":
            trained[f"{name}.latent"] = _Trained(part.latent, spec.code_rate * share)
        else:
            part.latent.requires_grad_(False)
    for name, layer in layers.items():
        for kind, factor in layer.adapters().items():
            trained[f"{name}.{kind}"] = _Trained(factor, spec.adapter_rate)
    return trained


def _rate_share(bits: int) -> float:
    """Return the share of the full learning rate for codes of some bits, and for their scales."""
    return 2.0 ** (_FULL_RATE_BITS - bits)


def _freeze(factor: nn.Parameter, groups: Tensor) -> None:
    """Give the scales of some groups, bool [groups], no gradient."""
    frozen = groups.to(factor.device).view(1, -1, 1)
    factor.register_hook(lambda gradient: gradient.masked_fill(frozen, 0))  # type: ignore[no-untyped-call]
