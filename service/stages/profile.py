"""The stage that measures how storing each layer at each fidelity changes the model's loss."""

from dataclasses import dataclass, replace
from pathlib import Path

from allocator.profile import Profile
from allocator.profiling import profiler
from allocator.profiling.candidates import Candidates
from allocator.profiling.context import ProfileSpec
from allocator.profiling.profiler import ProfileProgress, ProfilingInputs
from allocator.signals import find_signal
from allocator.unquantized import Unquantized
from quantizer.durable import PartStore
from quantizer.structure.blocks import find_layers
from service.request.request import RunRequest
from service.stages.context import RunContext
from service.stages.layer_candidates import CandidatesTask, quantize_layers
from service.stages.prepared_run import PreparedRun
from service.stages.windows import Windows
from service.storage.profile_store import read_profile
from service.storage.stage_store import StageKey

PROBE_BATCH = 2
"""Probe windows that are run at once.

A backward pass keeps the activations of all blocks in memory.
"""


@dataclass(frozen=True, slots=True)
class ProfileTask:
    """Everything that decides a profile, beside the context.

    Attributes:
        candidates: the quantized candidates of all layers. The budget enters through their menu
            only, so similar budgets share a profile.
        probes: windows that effects are measured on.
        signal: how they are measured, see `allocator.signals`.
        in_original: whether they are measured in the original model, see
            `allocator.profiling.context.ProfileSpec`.
        seed: of everything random.
    """

    candidates: CandidatesTask
    probes: Windows
    signal: str
    in_original: bool
    seed: int

    @classmethod
    def for_request(
        cls, request: RunRequest, prepared: PreparedRun, calibration: Windows, probes: Windows
    ) -> "ProfileTask":
        """Return everything that decides the profile of a run.

        Args:
            request: gives the method and the seed.
            prepared: gives the menu.
            calibration: windows that layers are quantized on.
            probes: windows that effects are measured on, with all their tokens.
        """
        amounts = request.amounts
        candidates = CandidatesTask(prepared.menu, calibration, keep_all=amounts.check_plans > 0)
        return cls(
            candidates=candidates,
            probes=probes.first_tokens(amounts.probe_tokens),
            signal=request.method.signal,
            in_original=request.method.in_original,
            seed=request.seed,
        )

    def key(self, context: RunContext) -> StageKey:
        """Return what the profile is stored under."""
        inputs = {
            "candidates": self.candidates.key(context).digest,
            "probes": self.probes.sha256,
            "signal": self.signal,
            "in_original": self.in_original,
            "seed": self.seed,
            "method": profiler.METHOD,
        }
        return StageKey("profile", inputs)


def measure_profile(
    context: RunContext, task: ProfileTask, unquantized: Unquantized | None = None
) -> Profile:
    """Measure the effect of every layer and fidelity, or continue where this was interrupted.

    Args:
        context: gives the model and the machine.
        task: what is measured.
        unquantized: what the checkpoint contains beside the layers; it becomes a part of the
            profile, so that budgets of whole checkpoints can be resolved from it.
    """

    def make(folder: Path, parts: PartStore) -> None:
        stored = quantize_layers(context, task.candidates)
        runner = context.load()
        spec = ProfileSpec(
            find_signal(task.signal),
            context.on_device(task.probes),
            PROBE_BATCH,
            task.seed,
            task.in_original,
        )
        progress = ProfileProgress(
            context.reporter.step("profile: context"),
            context.reporter.step(f"profile: {task.signal}"),
        )
        inputs = ProfilingInputs(
            runner,
            Candidates(find_layers(runner.model), task.candidates.menu, stored),
            context.calibration(task.candidates.calibration),
            model_sha256=context.model.sha256,
            calibration_sha256=task.candidates.calibration.sha256,
        )
        measured = profiler.profile_model(inputs, spec, parts, progress)
        head, arrays = measured.dumps()
        (folder / "profile.json").write_bytes(head)
        (folder / "profile.npz").write_bytes(arrays)

    profile = read_profile(context.store.get(task.key(context), make))
    return replace(profile, unquantized=unquantized)
