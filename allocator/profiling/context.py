"""What a signal is measured on: a quantized model with its candidates, probes and original."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from allocator.demands.menu import Menu
from allocator.profile import Array
from allocator.profiling.candidates import Candidates
from allocator.signals import Signal
from quantizer.durable import PartStore, Progress
from quantizer.modules.linear import get_linear, set_dequantized_weight
from quantizer.packed.weight import QuantizedWeight
from quantizer.plans.fidelity import Fidelity
from quantizer.plans.plan import LayerSpec
from quantizer.running.divergence import divergence
from quantizer.running.memoized import memoized
from quantizer.running.runner import BlockRunner


@dataclass(frozen=True, slots=True)
class ProfileSpec:
    """How to measure.

    Attributes:
        signal: what is measured.
        probes: token windows that the model is run on, int64 [windows, tokens]. They must differ
            from the calibration windows: on those, the errors of layers are smaller than on any
            other text.
        batch: number of windows that are run at once.
        seed: seed of all random numbers.
        in_original: whether the user asks for the original model as the context: the other layers
            are not quantized while one layer is measured.
    """

    signal: Signal
    probes: Tensor
    batch: int
    seed: int
    in_original: bool = False


@dataclass(frozen=True, slots=True)
class ProfilingContext:
    """A model in a uniform context, ready to be measured.

    In the context, every layer is quantized at the same fidelity. A function that measures a signal
    may change weights, but leaves the model in the context.

    Attributes:
        runner: the model.
        candidates: its layers at every fidelity of the menu.
        spec: how to measure.
        output_error: mean squared output error of each layer at each fidelity, float64 [L, K].
        weight_error: relative squared weight error |E|^2 / |W|^2, float64 [L, K].
        originals: original weights of the layers, by name.
        original_states: what enters the output head of the original model on the probes, [windows,
            tokens, hidden].
        parts: where finished measurements are stored, for a later run to continue from.
        on_progress: called with (steps done, steps in all).
    """

    runner: BlockRunner
    candidates: Candidates
    spec: ProfileSpec
    output_error: Array
    weight_error: Array
    originals: Mapping[str, Tensor]
    original_states: Tensor
    parts: PartStore
    on_progress: Progress

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """The L layers of the model."""
        return self.candidates.layers

    @property
    def menu(self) -> Menu:
        """The K fidelities, and which of them is the context's."""
        return self.candidates.menu

    @property
    def uniform(self) -> Fidelity:
        """The fidelity that every layer has in the context."""
        return self.menu.fidelities[self.menu.context]

    @property
    def in_original(self) -> bool:
        """Whether the signal is measured in the original model."""
        return self.spec.signal.in_original(requested=self.spec.in_original)

    @property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Batches of probes: (token windows, what enters the original model's head on them)."""
        windows = torch.split(self.spec.probes, self.spec.batch)
        states = torch.split(self.original_states, self.spec.batch)
        return list(zip(windows, states, strict=True))

    def set_layer(self, name: str, weight: QuantizedWeight | None) -> None:
        """Give a layer a quantized weight, or its original weight if None."""
        if weight is None:
            get_linear(self.runner.model, name).weight.data = self.originals[name].clone()
        else:
            set_dequantized_weight(self.runner.model, name, weight)

    def set_original(self) -> None:
        """Give all layers their original weights."""
        for layer in self.layers:
            self.set_layer(layer.name, None)

    def set_uniform(self) -> None:
        """Quantize all layers as in the context."""
        for block in self.candidates.blocks(self.candidates.kept_choices):
            for name, weights in block.weights.items():
                self.set_layer(name, weights[self.uniform.name])

    def batch_loss(self, index: int) -> Array:
        """Return KL(original || model) on batch `index` of the probes, [windows], [nats/token].

        The model must be in the context; the result is stored.
        """
        windows, original = self.batches[index]

        def compute() -> dict[str, Tensor]:
            states = self.runner.final_states(windows)
            return {"loss": divergence(self.runner, windows, states, original)[0]}

        loss = memoized(self.parts, f"loss-{index:04d}", compute)["loss"]
        return np.asarray(loss.double().numpy(), dtype=np.float64)
