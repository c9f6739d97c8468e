"""The stages of the main job: each takes what the stages before it made, and keeps what it makes.

calibration -> profile -> plan -> checkpoint -> evaluation -> report
"""

import gc
import hashlib
import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from allocator import allocate as solver
from allocator.answers.allocation import Allocation
from allocator.demands.constraints import Constraints
from allocator.demands.menu import Menu
from allocator.profile import Profile
from allocator.profiling import profiler
from allocator.profiling.profiler import ProfileProgress
from allocator.profiling.signal import ProfileSpec
from quantizer.conversion import blocks
from quantizer.conversion.blocks import quantize_blocks, read_block
from quantizer.conversion.checkpoint import pack_model, save_checkpoint
from quantizer.conversion.embeddings import find_tables, install_tables, quantize_tables
from quantizer.durable import PartStore, file_sha256
from quantizer.errors import PlanError
from quantizer.kernels.precision import fast_precision, products_in
from quantizer.models.source import (
    ModelFolder,
    check_checkpoint,
    load_config,
    load_model,
    load_tokenizer,
)
from quantizer.packed.weight import QuantizedWeight
from quantizer.plans.plan import Plan
from quantizer.rounding.methods import USUAL, Rounding
from quantizer.running import evaluate
from quantizer.running.evaluate import Quality, evaluate_models
from quantizer.running.memory import place
from quantizer.running.moments import Calibration
from quantizer.running.runner import BlockRunner
from quantizer.running.structure import find_layers
from quantizer.texts.text import TextSpec, read_text, text_sha256
from quantizer.texts.windows import make_windows
from service.checks import Check, check_plans
from service.effort import Effort
from service.files import read_profile
from service.progress import Reporter
from service.store import StageKey, StageStore, link_or_copy

PROBE_BATCH = 2
"""Probe windows that are run at once.

A backward pass keeps what all blocks compute on them in memory.
"""


@dataclass(frozen=True, slots=True)
class Windows:
    """Token windows and where they come from.

    Attributes:
        tokens: int64 [windows, tokens].
        sha256: digest of the windows.
        source: what the user called the text.
    """

    tokens: Tensor
    sha256: str
    source: str

    @classmethod
    def of(cls, tokens: Tensor, source: str) -> "Windows":
        """Return these windows with their digest."""
        return cls(tokens, hashlib.sha256(tokens.numpy().tobytes()).hexdigest(), source)


@dataclass(frozen=True, slots=True)
class Machine:
    """Where models run: device and dtype."""

    device: str
    dtype: torch.dtype

    @property
    def precision(self) -> torch.dtype:
        """The dtype of matrix products while layers are measured, quantized and trained.

        Results are scored in `dtype`.
        """
        return fast_precision(self.device)

    def runner(self, model: Any) -> BlockRunner:
        """Return a runner of a model that was loaded for this machine."""
        return BlockRunner(model, self.precision)

    @classmethod
    def choose(cls, wanted: str) -> "Machine":
        """Return the machine for `auto`, `cpu` or `cuda`: float32 on a CPU, bfloat16 on a GPU."""
        device = (
            "cuda"
            if wanted == "auto" and torch.cuda.is_available()
            else wanted.replace("auto", "cpu")
        )
        return cls(device, torch.bfloat16 if device == "cuda" else torch.float32)

    def inputs(self) -> dict[str, str]:
        """Return what of the machine decides results, for the hash of a stage."""
        return {
            "device": self.device,
            "dtype": str(self.dtype),
            "products": str(self.precision),
            "torch": version("torch"),
        }


def windows_of(
    store: StageStore, model: ModelFolder, spec: TextSpec, used_tokens: int | None = None
) -> Windows:
    """Cut a text into token windows, of which the first `used_tokens` tokens are taken if it is given.

    Raises:
        TextError: the text cannot be used.
    """
    text = read_text(spec.source)
    inputs = {
        "model": model.sha256,
        "text": text_sha256(text),
        **{k: v for k, v in asdict(spec).items() if k != "source"},
    }

    def make(folder: Path, _: PartStore) -> None:
        save_file(
            {"windows": make_windows(text, spec, load_tokenizer(model))},
            folder / "windows.safetensors",
        )

    folder = store.get(StageKey("calibration", inputs), make)
    tokens = load_file(folder / "windows.safetensors")["windows"][:, :used_tokens].contiguous()
    return Windows.of(tokens, spec.source)


def windows_without(
    store: StageStore, model: ModelFolder, spec: TextSpec, held_out: Windows, count: int
) -> Windows:
    """Return at most `count` windows of a text, at random by the seed, in the text's order, but none of those that are held out."""
    every = windows_of(store, model, TextSpec(spec.source, 0, spec.tokens, None))
    avoided = {row.numpy().tobytes() for row in held_out.tokens}
    rows = torch.tensor(
        [at for at, row in enumerate(every.tokens) if row.numpy().tobytes() not in avoided]
    )
    generator = torch.Generator().manual_seed(spec.seed or 0)
    chosen = rows[torch.randperm(len(rows), generator=generator)[:count]].sort().values
    return Windows.of(every.tokens[chosen], spec.source)


def quantizing_windows(
    store: StageStore, model: ModelFolder, spec: TextSpec, held_out: Windows, effort: Effort
) -> Windows:
    """Return the windows that the layers of a plan are quantized on."""
    if effort.calibration == 1:
        return windows_of(store, model, spec)
    return windows_without(store, model, spec, held_out, effort.calibration * spec.windows)


def skeleton(model: ModelFolder) -> Any:
    """Return the model without storage for its weights."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415  seconds to import; bad input is told before

    config = load_config(model)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


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
            `allocator.profiling.signal.ProfileSpec`.
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
        profiler.make_forms(
            task.machine.runner(loaded),
            find_layers(loaded),
            task.menu,
            calibration,
            parts,
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
        measured = profiler.profile_model(
            machine.runner(loaded),
            find_layers(loaded),
            task.menu,
            Calibration(task.calibration.tokens.to(machine.device), task.batch),
            ProfileSpec(
                task.signal,
                task.probes.tokens.to(machine.device),
                PROBE_BATCH,
                task.seed,
                task.in_original,
            ),
            parts,
            ProfileProgress(
                reporter.step("profile: context"), reporter.step(f"profile: {task.signal}")
            ),
            model_sha256=task.model.sha256,
            calibration_sha256=task.calibration.sha256,
            forms=made,
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
) -> list[Check]:
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
        found = check_plans(
            task.machine.runner(loaded), measured, budget_bytes, count, tokens, made, parts, told
        )
        _write(folder / "checks.json", json.dumps([asdict(check) for check in found]))

    folder = store.get(StageKey("checks", inputs), make)
    return [
        Check(**row) for row in json.loads((folder / "checks.json").read_text(encoding="utf-8"))
    ]


def plan(
    store: StageStore, measured: Profile, budget_bytes: int, constraints: Constraints
) -> Allocation:
    """Solve for the plan of a budget.

    Solving takes less time than looking it up; the plan is kept as a record of the run.
    """
    allocation = solver.allocate(measured, budget_bytes, constraints)
    head, arrays = measured.dumps()
    inputs = {
        "profile": hashlib.sha256(head + arrays).hexdigest(),
        "budget_bytes": budget_bytes,
        "constraints": asdict(constraints),
        "method": solver.METHOD,
    }
    store.get(
        StageKey("plan", inputs), lambda folder, _: _write(folder / "plan.json", allocation.dumps())
    )
    return allocation


def check_plan(model: ModelFolder, chosen: Plan) -> None:
    """Refuse a plan that was made for other layers than the model's.

    Raises:
        PlanError: names the first layer that differs.
    """
    bare = skeleton(model)
    tables = [table for table in find_tables(bare) if table in chosen.tables]
    for planned, found in zip_longest(chosen.layers, (*find_layers(bare), *tables)):
        if planned != found:
            raise PlanError(
                f"the plan has layer {planned}, the model {model.name!r} has {found} in its "
                "place; make a plan for it"
            )


def checkpoint(
    store: StageStore,
    model: ModelFolder,
    chosen: Plan,
    windows: Windows,
    batch: int,
    machine: Machine,
    reporter: Reporter,
    label: str,
    rounding: Rounding = USUAL,
) -> Path:
    """Quantize the model as the plan says and return the folder of the checkpoint, complete and loadable."""
    inputs: dict[str, Any] = {
        "model": model.sha256,
        "calibration": windows.sha256,
        "plan": {name: fidelity.name for name, fidelity in chosen.by_name.items()},
        "batch": batch,
        "method": blocks.METHOD,
        "machine": machine.inputs(),
        "transformers": version("transformers"),
    }
    if rounding != USUAL:
        inputs["rounding"] = rounding.name

    def make(folder: Path, parts: PartStore) -> None:
        loaded = load_model(model, machine.dtype, machine.device)
        choices = {name: (fidelity,) for name, fidelity in chosen.by_name.items()}
        calibration = Calibration(windows.tokens.to(machine.device), batch)
        told, runner = reporter.step(label), machine.runner(loaded)
        tables = quantize_tables(
            runner, {each.name: how for each, how in chosen.tables.items()}, calibration.batches()
        )
        install_tables(loaded, tables)
        quantize_blocks(
            runner, chosen.in_blocks.layers, choices, calibration, parts, told, rounding=rounding
        )
        pack_model(loaded, chosen, stored_weights(chosen, parts) | tables)
        save_checkpoint(loaded, model, chosen, folder / "model")

    return store.get(StageKey("checkpoint", inputs), make) / "model"


def stored_weights(chosen: Plan, parts: PartStore) -> dict[str, QuantizedWeight]:
    """Return the stored forms of all layers in blocks out of the parts that `quantize_blocks` kept, by name."""
    chosen = chosen.in_blocks
    weights: dict[str, QuantizedWeight] = {}
    names = chosen.by_name
    for index in sorted({layer.block for layer in chosen.layers}):
        members = [layer for layer in chosen.layers if layer.block == index]
        block = read_block(
            parts, members, {layer.name: (names[layer.name],) for layer in members}, index
        )
        if block is None:
            raise RuntimeError(f"block {index} was quantized, but its stored form is gone")
        weights |= {name: forms[names[name].name] for name, forms in block.weights.items()}
    return weights


def evaluation(
    store: StageStore,
    model: ModelFolder,
    checkpoints: dict[str, Path],
    windows: Windows,
    batch: int,
    machine: Machine,
    reporter: Reporter,
    label: str = "evaluate",
    *,
    fast: bool = False,
) -> dict[str, Quality]:
    """Score the original and the saved checkpoints on the same windows, side by side.

    `fast` is enough to tell which is best.
    """
    precision = machine.precision if fast else torch.float32
    inputs = {
        "model": model.sha256,
        "checkpoints": {name: checkpoint_digest(path) for name, path in checkpoints.items()},
        "windows": windows.sha256,
        "batch": batch,
        "products": str(precision),
        "method": evaluate.METHOD,
        "machine": machine.inputs(),
    }

    def make(folder: Path, parts: PartStore) -> None:
        models = {"original": load_model(model, machine.dtype, machine.device)}
        models |= {name: load_checkpoint(path, machine) for name, path in checkpoints.items()}
        with products_in(precision, torch.device(machine.device)):
            scores = evaluate_models(
                models, "original", windows.tokens, batch, parts, reporter.step(label)
            )
        _write(
            folder / "evaluation.json",
            json.dumps({name: score.to_json() for name, score in scores.items()}),
        )
        models.clear()
        gc.collect()

    folder = store.get(StageKey("evaluation", inputs), make)
    stored = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    return {name: Quality.from_json(values) for name, values in stored.items()}


def load_checkpoint(path: Path, machine: Machine) -> Any:
    """Return a saved checkpoint as a user would load it.

    Raises:
        ModelError: it is not one that is safe to load.
        MemoryShort: it does not fit on the device.
    """
    from transformers import AutoModelForCausalLM  # noqa: PLC0415  see skeleton

    check_checkpoint(path)
    loaded = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=machine.dtype,
        trust_remote_code=False,
        use_safetensors=True,
        local_files_only=True,
    )
    return place(loaded, machine.device).eval()


def checkpoint_digest(folder: Path) -> str:
    """Return a digest of a checkpoint's weights and configuration."""
    files = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".json"))
    return hashlib.sha256(
        "\n".join(f"{file.name}:{file_sha256(file)}" for file in files).encode()
    ).hexdigest()


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
