"""Measure a model: quantize it in a uniform context near the budget, then measure a signal."""

from dataclasses import dataclass

import torch
from torch import Tensor

from allocator.profile import Profile
from allocator.profiling.candidates import Candidates, quantize_candidates
from allocator.profiling.context import ProfileSpec, ProfilingContext
from allocator.profiling.measures import MEASURES
from quantizer.durable import PartStore, Progress
from quantizer.modules.linear import get_linear
from quantizer.running.memoized import memoized
from quantizer.running.moments import Calibration
from quantizer.running.runner import BlockRunner

METHOD = "profile-5"
"""Version of what this module and the signals compute.

It is part of the key of stored profiles. Give it a new value whenever results change, so that no
stale profile is reused.
"""


@dataclass(frozen=True, slots=True)
class ProfilingInputs:
    """What is profiled.

    Attributes:
        runner: the model, not quantized.
        candidates: its layers, the menu, and where quantized candidates are stored.
        calibration: windows that layers are quantized on.
        model_sha256: digest of the model, recorded in the profile.
        calibration_sha256: digest of the calibration windows, recorded in the profile.
    """

    runner: BlockRunner
    candidates: Candidates
    calibration: Calibration
    model_sha256: str
    calibration_sha256: str


@dataclass(frozen=True, slots=True)
class ProfileProgress:
    """Called as the two steps of profiling advance.

    Attributes:
        quantize: called after each block that is quantized, or read from the store.
        measure: called after each step of the signal.
    """

    quantize: Progress
    measure: Progress


def profile_model(
    inputs: ProfilingInputs, spec: ProfileSpec, parts: PartStore, progress: ProfileProgress
) -> Profile:
    """Return the profile of a model, and leave its weights in the context.

    A copy of the layers' original weights is held in memory beside the model. Work that an
    interrupted run stored is not repeated.

    Args:
        inputs: the model and its candidates.
        spec: what is measured, and on which windows.
        parts: where finished measurements are stored.
        progress: called as the work advances.
    """
    context = _profiling_context(inputs, spec, parts, progress)
    model = MEASURES[spec.signal](context)
    return Profile(
        signal=spec.signal.name,
        layers=context.layers,
        fidelities=context.menu.fidelities,
        context=None if context.in_original else context.menu.context,
        context_loss=model.context_loss,
        linear=model.linear,
        factor=model.factor,
        truncation=model.truncation,
        tokens=model.tokens,
        model_sha256=inputs.model_sha256,
        calibration_sha256=inputs.calibration_sha256,
    )


def _profiling_context(
    inputs: ProfilingInputs, spec: ProfileSpec, parts: PartStore, progress: ProfileProgress
) -> ProfilingContext:
    """Quantize the model in the uniform context; return it with what belongs to the original."""
    runner = inputs.runner
    candidates = inputs.candidates

    def original_states() -> dict[str, Tensor]:
        batches = torch.split(spec.probes, spec.batch)
        states = [runner.final_states(batch) for batch in batches]
        return {"states": torch.cat(states)}

    states = memoized(parts, "original", original_states)["states"].to(spec.probes.device)
    originals = {
        layer.name: get_linear(runner.model, layer.name).weight.data.clone()
        for layer in candidates.layers
    }
    quantize_candidates(runner, candidates, inputs.calibration, progress.quantize)
    output_error, weight_error = candidates.errors()
    return ProfilingContext(
        runner=runner,
        candidates=candidates,
        spec=spec,
        output_error=output_error,
        weight_error=weight_error,
        originals=originals,
        original_states=states,
        parts=parts,
        on_progress=progress.measure,
    )
