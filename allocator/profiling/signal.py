"""What a signal has to work with, and what it gives.

The one small interface between measuring and modelling.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from safetensors.torch import load, save
from torch import Tensor

from allocator.demands.menu import Menu
from allocator.profile import Array
from allocator.signals import Signal
from quantizer.conversion.blocks import QuantizedBlock, read_block
from quantizer.durable import PartStore, Progress
from quantizer.modules.linear import get_linear, set_dequantized_weight
from quantizer.packed.weight import QuantizedWeight
from quantizer.plans.fidelity import Fidelity
from quantizer.plans.plan import LayerSpec, by_block
from quantizer.running.divergence import divergence
from quantizer.running.runner import BlockRunner


@dataclass(frozen=True, slots=True)
class ProfileSpec:
    """How effects are measured.

    Attributes:
        signal: what is measured.
        probes: token windows that the model is run on, int64 [windows, tokens]; text that layers
            were not quantized on, since their errors are smaller there than anywhere else.
        batch: windows that are run at once.
        seed: of everything random.
        in_original: whether the other layers are as they were while one is measured, instead of in
            the context.
    """

    signal: Signal
    probes: Tensor
    batch: int
    seed: int
    in_original: bool = False


@dataclass(frozen=True, slots=True)
class LossModel:
    """What a signal gives: the loss around the context, see `allocator.profile`.

    Attributes:
        context_loss: KL divergence of the context from the original, [nats/token]; 0 where the
            original is the context.
        linear: float64 [L, K], [nats/token].
        factor: float64 [rank, L * K], [sqrt(nats/token)]; rank 0 where damages just add up.
        truncation: share of the products between layers that the rank leaves out, see
            `allocator.profiling.coupling`.
        tokens: probe tokens that were used.
    """

    context_loss: float
    linear: Array
    factor: Array
    truncation: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Scene:
    """A model whose layers were quantized in a uniform context, ready to be measured.

    The model is in the context; a signal that changes weights puts them back.

    Attributes:
        runner: the model.
        layers: its L layers.
        menu: the K fidelities and the context.
        spec: how effects are measured.
        output_error: mean squared output error of each layer at each fidelity, float64 [L, K].
        weight_error: relative squared weight error, float64 [L, K].
        originals: weights of the layers before they were quantized, by name.
        original_states: what enters the head of the original model on the probes, [windows, tokens,
            hidden].
        stored: quantized forms.
        parts: where finished work is kept.
        on_progress: told of finished work.
    """

    runner: BlockRunner
    layers: tuple[LayerSpec, ...]
    menu: Menu
    spec: ProfileSpec
    output_error: Array
    weight_error: Array
    originals: Mapping[str, Tensor]
    original_states: Tensor
    stored: PartStore
    parts: PartStore
    on_progress: Progress

    @property
    def forms(self) -> tuple[Fidelity, ...]:
        """Fidelities whose stored forms are at hand.

        The context and the two ends of the menu, each once.
        """
        return stored_forms(self.menu)

    def block(self, index: int) -> QuantizedBlock:
        """Return the stored forms of a block."""
        members = by_block(self.layers).get(index, ())
        choices = {layer.name: self.forms for layer in members}
        return read_block(self.stored, members, choices, index)

    def put(self, layer: LayerSpec, form: QuantizedWeight | None) -> None:
        """Give a layer a stored form, or its original weight."""
        if form is None:
            get_linear(self.runner.model, layer.name).weight.data = self.originals[
                layer.name
            ].clone()
        else:
            set_dequantized_weight(self.runner.model, layer.name, form)

    def put_all(self, fidelity: Fidelity | None) -> None:
        """Give all layers one of `forms`, or their original weights."""
        for index, members in by_block(self.layers).items():
            stored = self.block(index)
            for layer in members:
                self.put(layer, stored.weights[layer.name][fidelity.name] if fidelity else None)


class Measure(Protocol):
    """Measures a signal."""

    def __call__(self, scene: Scene) -> LossModel:
        """Measure, taking up what `scene.parts` holds of an earlier, interrupted run."""
        ...


def stored_forms(menu: Menu) -> tuple[Fidelity, ...]:
    """Return the fidelities whose forms a profile keeps while it is measured, the context first."""
    return tuple(
        dict.fromkeys((menu.fidelities[menu.context], menu.fidelities[0], menu.fidelities[-1]))
    )


def kept(parts: PartStore, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return tensors out of `parts`, making and keeping them first unless they are there."""
    data = parts.read(name)
    if data is None:
        data = save({key: tensor.contiguous().cpu() for key, tensor in make().items()})
        parts.write(name, data)
    tensors: dict[str, Tensor] = load(data)
    return tensors


def additive(context_loss: float, linear: Array, tokens: int) -> LossModel:
    """Return the model in which damages just add up."""
    return LossModel(context_loss, linear, np.zeros((0, linear.size)), 0.0, tokens)


def context_loss(scene: Scene, part: str, batch: Tensor, original: Tensor) -> Array:
    """Return the KL of the model as it is from the original on each window of a batch, [windows], [nats/token]."""
    runner = scene.runner

    def measure() -> dict[str, Tensor]:
        return {"loss": divergence(runner, batch, runner.final_states(batch), original)[0]}

    return np.asarray(kept(scene.parts, part, measure)["loss"].double().numpy(), dtype=np.float64)
