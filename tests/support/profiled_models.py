"""Tiny models ready to be measured, with exact divergences and weight gradients to compare with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from allocator.demands.menu import Menu
from allocator.profile import Profile
from allocator.profiling.candidates import Candidates, quantize_candidates
from allocator.profiling.context import ProfileSpec, ProfilingContext
from allocator.profiling.profiler import ProfileProgress, ProfilingInputs, profile_model
from allocator.signals import find_signal
from quantizer.durable import PartStore, Progress
from quantizer.models.loading import load_model
from quantizer.models.source import find_model
from quantizer.modules.linear import set_dequantized_weight
from quantizer.plans.fidelity import Fidelity
from quantizer.running.moments import Calibration
from quantizer.running.runner import BlockRunner
from quantizer.structure.blocks import find_layers
from tests.support.tiny_models import VOCABULARY, save_tiny

Loader = Callable[[], Any]


def windows(count: int, tokens: int, seed: int) -> Tensor:
    """Return random token ids, int64 [count, tokens]."""
    return torch.randint(VOCABULARY, (count, tokens), generator=torch.Generator().manual_seed(seed))


CALIBRATION = Calibration(windows(4, 32, 0), 2)
PROBES = windows(4, 32, 1)


def make_menu(low: int, high: int) -> Menu:
    """Return uniform low, two mixes of low and high columns, uniform high.

    The context is the mix with fewer high columns. Layers of 2 or 3 groups have 1 high group in it,
    and 1 or 2 in the other mix.
    """
    mixes = (Fidelity(low, high, 0.25, 32), Fidelity(low, high, 0.6, 32))
    return Menu((Fidelity.uniform(low, 32), *mixes, Fidelity.uniform(high, 32)), 1)


MENU = make_menu(4, 8)


def make_spec(
    signal: str,
    probes: Tensor = PROBES,
    *,
    batch: int = 2,
    seed: int = 0,
    in_original: bool = False,
) -> ProfileSpec:
    return ProfileSpec(find_signal(signal), probes, batch, seed, in_original)


def make_loader(folder: Path, family: str = "llama") -> Loader:
    """Return a function that loads a tiny model in float32, the same at each call."""
    found = find_model(str(save_tiny(folder / family, family)), folder)
    return lambda: load_model(found, torch.float32, "cpu")


def no_progress(done: int, steps: int) -> None:
    assert 0 < done <= steps


def run(
    model: Any,
    parts: PartStore,
    spec: ProfileSpec,
    menu: Menu = MENU,
    candidates: PartStore | None = None,
    quantize: Progress = no_progress,
    measure: Progress = no_progress,
) -> Profile:
    """Return the profile of a model that is not quantized.

    Args:
        model: the model.
        parts: where measurements are stored.
        spec: how to measure.
        menu: fidelities and context.
        candidates: where quantized candidates are stored; among the measurements if None.
        quantize: called as layers are quantized.
        measure: called as the signal is measured.
    """
    inputs = ProfilingInputs(
        BlockRunner(model),
        Candidates(find_layers(model), menu, candidates or parts),
        CALIBRATION,
        model_sha256="a" * 64,
        calibration_sha256="b" * 64,
    )
    return profile_model(inputs, spec, parts, ProfileProgress(quantize, measure))


def make_context(
    model: Any, store: PartStore, parts: PartStore, spec: ProfileSpec, menu: Menu = MENU
) -> ProfilingContext:
    """Quantize a model in the menu's context, and return it ready to be measured."""
    runner = BlockRunner(model)
    candidates = Candidates(find_layers(model), menu, store)
    originals = weights_of(model)
    states = runner.final_states(spec.probes)
    quantize_candidates(runner, candidates, CALIBRATION, no_progress)
    output_error, weight_error = candidates.errors()
    return ProfilingContext(
        runner,
        candidates,
        spec,
        output_error,
        weight_error,
        originals,
        states,
        parts,
        no_progress,
    )


def weights_of(model: Any) -> dict[str, Tensor]:
    """Return copies of the weights of all layers, by name."""
    return {
        layer.name: model.get_submodule(layer.name).weight.detach().clone()
        for layer in find_layers(model)
    }


def log_probs(model: Any, probes: Tensor = PROBES) -> Tensor:
    """Return the log of the next-token distributions, float64 [windows, tokens, vocabulary]."""
    logits: Tensor = model(input_ids=probes, use_cache=False).logits
    return logits.double().log_softmax(-1)


def divergences(original: Tensor, model: Any, probes: Tensor = PROBES) -> Tensor:
    """Return the exact KL from `original`, its log probabilities, of each window, [nats/token]."""
    return (original.exp() * (original - log_probs(model, probes))).sum(-1).mean(-1)


def weight_gradients(model: Any, losses_of: Callable[[], Tensor]) -> list[dict[str, Tensor]]:
    """Return the gradients of several losses with respect to all layers, float64, by layer name.

    Args:
        model: the model; its weights have no gradients, before and afterwards.
        losses_of: computes the losses, [losses].
    """
    weights = {layer.name: model.get_submodule(layer.name).weight for layer in find_layers(model)}
    for weight in weights.values():
        weight.requires_grad_()
    try:
        losses = losses_of()
        found = [
            torch.autograd.grad(loss, list(weights.values()), retain_graph=True, allow_unused=True)
            for loss in losses
        ]
    finally:
        for weight in weights.values():
            weight.requires_grad_(requires_grad=False)
    zero = torch.zeros(())
    return [
        {name: (zero if g is None else g).double() for name, g in zip(weights, row, strict=True)}
        for row in found
    ]


@dataclass(frozen=True)
class Measured:
    """A profile, the model in its context, and the original's log probabilities on the probes."""

    profile: Profile
    context: ProfilingContext
    original: Tensor

    @property
    def model(self) -> Any:
        return self.context.runner.model

    def set_ends(self, changes: Mapping[int, int]) -> None:
        """Give layers by index the low end (0) or high end (1) of the menu, or the context (2)."""
        candidates = self.context.candidates
        fidelities = (*candidates.ends, self.context.uniform)
        for at, end in changes.items():
            layer = self.context.layers[at]
            weights = candidates.block(layer.block).weights[layer.name]
            set_dequantized_weight(self.model, layer.name, weights[fidelities[end].name])

    def outputs(self, changes: Mapping[int, int]) -> Tensor:
        """Return the log probabilities of the model with these changes, float64 [N, vocabulary]."""
        self.set_ends(changes)
        with torch.no_grad():
            found = log_probs(self.model, self.context.spec.probes)
        self.set_ends(dict.fromkeys(changes, 2))
        return found.flatten(0, 1)

    def divergence(self, changes: Mapping[int, int]) -> float:
        """Return the exact KL from the original on the probes, [nats/token]."""
        original = self.original.flatten(0, 1)
        return float((original.exp() * (original - self.outputs(changes))).sum(-1).mean())
