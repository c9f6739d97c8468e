"""The stage that measures a model."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from allocator.demands.menu import Menu
from allocator.profile import Profile
from allocator.profiling import profiler
from allocator.profiling.candidates import Candidates, quantize_candidates
from allocator.profiling.context import ProfileSpec
from allocator.profiling.prediction_check import (
    PredictionCheck,
    PredictionCheckSpec,
    check_predictions,
)
from allocator.profiling.profiler import ProfileProgress, ProfilingInputs
from allocator.signals import find_signal
from quantizer.conversion import blocks
from quantizer.durable import PartStore
from quantizer.models.folder import ModelFolder
from quantizer.models.loading import load_model
from quantizer.running.moments import Calibration
from quantizer.running.structure import find_layers
from service.request.request import RunRequest
from service.stages.machine import Machine
from service.stages.prepare import Task
from service.stages.progress import Reporter
from service.stages.windows import Windows, windows_of
from service.storage.disk import _write, link_or_copy
from service.storage.profile_store import read_profile
from service.storage.stage_store import StageKey, StageStore

PROBE_BATCH = 2
"""Probe windows that are run at once.

A backward pass keeps what all blocks compute on them in memory.
"""


@dataclass(frozen=True, slots=True)
class ProfileTask:
    """All that decides a profile.

    Attributes:
        model: what is measured.
        menu: fidelities and context; the budget enters through it only, so near budgets share a
            profile.
        calibration: windows that layers are quantized on.
        probes: windows that effects are measured on.
        signal: how they are measured.
        in_original: whether they are measured in the original model, see
            `allocator.profiling.context.ProfileSpec`.
        keep_all: whether all quantized forms are kept, so that any plan can be assembled from them.
        batch: windows that are run at once.
        seed: of everything random.
        machine: where it is measured.
    """

    model: ModelFolder
    menu: Menu
    calibration: Windows
    probes: Windows
    signal: str
    in_original: bool
    keep_all: bool
    batch: int
    seed: int
    machine: Machine

    @property
    def forms_key(self) -> StageKey:
        """What the quantized forms are kept under, which all signals share."""
        inputs = {
            "model": self.model.sha256,
            "calibration": self.calibration.sha256,
            "menu": [fidelity.name for fidelity in self.menu.fidelities],
            "context": self.menu.context,
            "keep_all": self.keep_all,
            "batch": self.batch,
            "method": blocks.METHOD,
            "machine": self.machine.inputs(),
        }
        return StageKey("forms", inputs)

    @property
    def key(self) -> StageKey:
        """What the profile is kept under."""
        inputs = {
            "forms": self.forms_key.digest,
            "probes": self.probes.sha256,
            "signal": self.signal,
            "in_original": self.in_original,
            "seed": self.seed,
            "method": profiler.METHOD,
        }
        return StageKey("profile", inputs)


def forms(store: StageStore, task: ProfileTask, reporter: Reporter) -> Path:
    """Quantize every layer at every fidelity of the menu, or go on where it was left.

    Return the folder of the parts.
    """

    def make(folder: Path, parts: PartStore) -> None:
        loaded = load_model(task.model, task.machine.dtype, task.machine.device)
        calibration = Calibration(task.calibration.tokens.to(task.machine.device), task.batch)
        told = reporter.step("profile: quantize")
        quantize_candidates(
            task.machine.runner(loaded),
            Candidates(find_layers(loaded), task.menu, parts),
            calibration,
            told,
            keep_all=task.keep_all,
        )
        for part in parts.paths():
            link_or_copy(part, folder / part.name)

    return store.get(task.forms_key, make)


def profile(store: StageStore, task: ProfileTask, reporter: Reporter) -> Profile:
    """Measure the effect of every layer and fidelity, or go on where it was left."""
    machine = task.machine

    def make(folder: Path, parts: PartStore) -> None:
        made = PartStore(forms(store, task, reporter))
        loaded = load_model(task.model, machine.dtype, machine.device)
        inputs = ProfilingInputs(
            machine.runner(loaded),
            Candidates(find_layers(loaded), task.menu, made),
            Calibration(task.calibration.tokens.to(machine.device), task.batch),
            model_sha256=task.model.sha256,
            calibration_sha256=task.calibration.sha256,
        )
        measured = profiler.profile_model(
            inputs,
            ProfileSpec(
                find_signal(task.signal),
                task.probes.tokens.to(machine.device),
                PROBE_BATCH,
                task.seed,
                task.in_original,
            ),
            parts,
            ProfileProgress(
                reporter.step("profile: context"), reporter.step(f"profile: {task.signal}")
            ),
        )
        head, arrays = measured.dumps()
        (folder / "profile.json").write_bytes(head)
        (folder / "profile.npz").write_bytes(arrays)

    return read_profile(store.get(task.key, make))


def checks(
    store: StageStore,
    task: ProfileTask,
    measured: Profile,
    budget_bytes: int,
    count: int,
    windows: Windows,
    reporter: Reporter,
) -> list[PredictionCheck]:
    """Measure random plans that the profile never saw; `task` must keep all forms."""
    inputs = {
        "profile": task.key.digest,
        "budget_bytes": budget_bytes,
        "count": count,
        "windows": windows.sha256,
    }

    def make(folder: Path, parts: PartStore) -> None:
        loaded = load_model(task.model, task.machine.dtype, task.machine.device)
        tokens, made = (
            windows.tokens.to(task.machine.device),
            PartStore(forms(store, task, reporter)),
        )
        told = reporter.step("check")
        found = check_predictions(
            task.machine.runner(loaded),
            measured,
            Candidates(measured.layers, task.menu, made),
            PredictionCheckSpec(budget_bytes, count, tokens),
            parts,
            told,
        )
        _write(folder / "checks.json", json.dumps([asdict(check) for check in found]))

    folder = store.get(StageKey("checks", inputs), make)
    return [
        PredictionCheck(**row)
        for row in json.loads((folder / "checks.json").read_text(encoding="utf-8"))
    ]


def profile_task(request: RunRequest, task: Task, store: StageStore) -> ProfileTask:
    """Return all that decides the profile of a request."""
    amounts, machine = request.amounts, Machine.choose(request.device)
    return ProfileTask(
        model=task.model,
        menu=task.menu,
        calibration=windows_of(store, task.model, amounts.calibration),
        probes=windows_of(store, task.model, amounts.probes, amounts.probe_tokens),
        signal=request.method.signal,
        in_original=request.method.in_original,
        keep_all=amounts.check_plans > 0,
        batch=amounts.batch,
        seed=request.seed,
        machine=machine,
    )


def checks_of(
    request: RunRequest,
    task: Task,
    profiling: ProfileTask,
    profile: Profile,
    windows: Windows,
    store: StageStore,
    reporter: Reporter,
) -> list[PredictionCheck]:
    """Return the random plans that were measured, as many as the request wants."""
    count = request.amounts.check_plans
    return (
        checks(store, profiling, profile, task.budget_bytes, count, windows, reporter)
        if count
        else []
    )
