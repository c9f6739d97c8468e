"""Measure a model: quantize it in a uniform context near the budget, and let a signal tell what each layer costs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from allocator.demands.menu import Menu
from allocator.profile import Array, Profile
from allocator.profiling.measures import MEASURES
from allocator.profiling.signal import ProfileSpec, Scene, kept, stored_forms
from quantizer.conversion.blocks import quantize_blocks, read_blocks
from quantizer.durable import PartStore, Progress
from quantizer.modules.linear import get_linear
from quantizer.plans.plan import LayerSpec
from quantizer.running.moments import Calibration
from quantizer.running.runner import BlockRunner

METHOD = "profile-5"
"""Names what this module and the signals compute.

A change of their results gets a new name, so that no stale profile is reused.
"""


@dataclass(frozen=True, slots=True)
class ProfileProgress:
    """Whom to tell of the two long steps."""

    quantize: Progress
    measure: Progress


def profile_model(
    runner: BlockRunner,
    layers: Sequence[LayerSpec],
    menu: Menu,
    calibration: Calibration,
    spec: ProfileSpec,
    parts: PartStore,
    progress: ProfileProgress,
    *,
    model_sha256: str,
    calibration_sha256: str,
    forms: PartStore | None = None,
) -> Profile:
    """Return the profile of a model; its weights are left in the context.

    The layers' original weights are held in memory beside the model.

    Args:
        runner: the model, unquantized.
        layers: its layers.
        menu: fidelities and context.
        calibration: windows that layers are quantized on.
        spec: how effects are measured, and on which windows.
        parts: where finished work is kept, for a later run to take up.
        progress: told of finished work.
        model_sha256: recorded in the profile.
        calibration_sha256: recorded in the profile.
        forms: where `make_forms` keeps, or kept, the quantized forms; None is for `parts`.
    """
    probes = torch.split(spec.probes, spec.batch)
    states = kept(
        parts,
        "original",
        lambda: {"states": torch.cat([runner.final_states(batch) for batch in probes])},
    )["states"].to(spec.probes.device)
    originals = {
        layer.name: get_linear(runner.model, layer.name).weight.data.clone() for layer in layers
    }
    forms = forms or parts
    make_forms(runner, layers, menu, calibration, forms, progress.quantize)
    errors = _errors(layers, menu, forms)
    scene = Scene(
        runner,
        tuple(layers),
        menu,
        spec,
        *errors,
        originals,
        states,
        forms,
        parts,
        progress.measure,
    )
    model = MEASURES[spec.signal](scene)
    in_original = spec.signal.in_original(requested=spec.in_original)
    return Profile(
        signal=spec.signal.name,
        layers=tuple(layers),
        fidelities=menu.fidelities,
        context=None if in_original else menu.context,
        context_loss=model.context_loss,
        linear=model.linear,
        factor=model.factor,
        truncation=model.truncation,
        tokens=model.tokens,
        model_sha256=model_sha256,
        calibration_sha256=calibration_sha256,
    )


def make_forms(
    runner: BlockRunner,
    layers: Sequence[LayerSpec],
    menu: Menu,
    calibration: Calibration,
    forms: PartStore,
    on_progress: Progress,
    *,
    keep_all: bool = False,
) -> None:
    """Make every fidelity of the menu of every layer, in the menu's context, and leave the model in it.

    Errors of all are kept in `forms`, and the stored forms of the context and of the ends of the
    menu, or with `keep_all` of all fidelities. What is there is not made again.
    """
    stored = (
        tuple(dict.fromkeys((*stored_forms(menu), *menu.fidelities)))
        if keep_all
        else stored_forms(menu)
    )
    choices = dict.fromkeys((layer.name for layer in layers), stored)
    quantize_blocks(
        runner, layers, choices, calibration, forms, on_progress, scored=menu.fidelities
    )


def _errors(layers: Sequence[LayerSpec], menu: Menu, parts: PartStore) -> tuple[Array, Array]:
    """Return (mean squared output errors, relative squared weight errors), [L, K] each."""
    rows = []
    for block in read_blocks(parts, layers, {layer.name: () for layer in layers}):
        rows += [
            [errors[fidelity.name] for fidelity in menu.fidelities]
            for errors in block.errors.values()
        ]
    return np.array([[e.output for e in row] for row in rows]), np.array(
        [[e.weight for e in row] for row in rows]
    )
