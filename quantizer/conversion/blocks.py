"""Quantize a model block by block.

Each block sees the inputs that the already quantized blocks before it give.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from quantizer.conversion.parallel import core_count, map_on_cores
from quantizer.conversion.quantized_block import (
    Distortion,
    QuantizedBlock,
    distortion,
    find_block,
    write_block,
)
from quantizer.durable import PartStore, Progress
from quantizer.modules.linear import get_linear, set_dequantized_weight
from quantizer.packed.weight import QuantizedWeight
from quantizer.plans.fidelity import Fidelity
from quantizer.plans.plan import LayerSpec, Plan, by_block
from quantizer.rounding.inverse import damped_inverse
from quantizer.rounding.methods import (
    DEFAULT_ROUNDING,
    NO_SCORES,
    LayerScores,
    Rounding,
    quantize_candidates,
)
from quantizer.running.block_inputs import BlockInputs
from quantizer.running.moments import Calibration
from quantizer.running.runner import BlockRunner
from quantizer.running.waves import GroupMoments, measure_wave, waves

METHOD = "gptq-6"
"""Identifies what this module and the rooms below it compute.

It is part of the keys of stored results: a change of the results needs a new name.
"""

CANDIDATE_BYTES = 2**28
"""Memory for the candidates of a layer that are quantized at once; more on a GPU."""
_GPU_FREE_SHARE = 1 / 4
"""Share of a GPU's free memory that they may take."""
_BYTES_PER_WEIGHT = 12
"""Memory for each weight of each candidate."""


@dataclass(frozen=True, slots=True)
class QuantizationSpec:
    """What the layers of a model are quantized to.

    Attributes:
        choices: fidelities whose candidates are stored, by layer name, at least one each; the model
            is left with the first.
        measured: further fidelities for all layers, of which only the distortion is stored.
        rounding: how codes are found.
        scores: scores that the caller passes, by layer name.
    """

    choices: Mapping[str, Sequence[Fidelity]]
    measured: Sequence[Fidelity] = ()
    rounding: Rounding = DEFAULT_ROUNDING
    scores: Mapping[str, LayerScores] = field(default_factory=dict)

    @classmethod
    def for_plan(
        cls,
        plan: Plan,
        rounding: Rounding = DEFAULT_ROUNDING,
        scores: Mapping[str, LayerScores] | None = None,
    ) -> "QuantizationSpec":
        """Return the specification that quantizes each layer at its fidelity in a plan."""
        choices = {name: (fidelity,) for name, fidelity in plan.by_name.items()}
        return cls(choices, rounding=rounding, scores=scores or {})

    def candidates(self, layer: LayerSpec) -> tuple[Fidelity, ...]:
        """Return all fidelities at which a layer is quantized, each once."""
        return tuple(dict.fromkeys((*self.choices[layer.name], *self.measured)))


def quantize_blocks(
    runner: BlockRunner,
    layers: Sequence[LayerSpec],
    spec: QuantizationSpec,
    calibration: Calibration,
    parts: PartStore,
    on_progress: Progress,
) -> dict[str, int]:
    """Quantize every layer at each of its fidelities, block by block.

    Inside a block, layers are quantized in the order in which they are called, and see the inputs
    that the layers before them give once quantized at their first choice. At the end, the model has
    the dequantized weights of the first choices. Stored blocks are read by
    `quantizer.conversion.quantized_block.read_block`; they are not quantized again.

    Args:
        runner: the unquantized model; its weights are overwritten.
        layers: the layers to quantize.
        spec: what they are quantized to.
        calibration: windows on which the model runs.
        parts: where finished blocks are stored.
        on_progress: called after each block.

    Returns:
        Calibration tokens that reached a layer, by the names of layers of experts that fewer tokens
        reached than they have columns.
    """
    starved: dict[str, int] = {}
    batches = calibration.batches()
    hidden = [runner.initial_states(batch) for batch in batches]
    members = by_block(layers)
    for index in range(len(runner.blocks)):
        own = members.get(index, ())
        block = find_block(parts, own, spec.choices, index)
        if block is None:
            block = _quantize_block(BlockInputs(runner, index, batches, hidden), own, spec)
            write_block(parts, index, block)
        else:
            _set_first_choices(runner, own, spec, block)
        starved |= block.starved
        hidden = runner.advance(batches, hidden, index)
        on_progress(index + 1, len(runner.blocks))
    return starved


def _set_first_choices(
    runner: BlockRunner, layers: Sequence[LayerSpec], spec: QuantizationSpec, block: QuantizedBlock
) -> None:
    """Give layers the dequantized weights of their first choices."""
    for layer in layers:
        first = spec.choices[layer.name][0]
        set_dequantized_weight(runner.model, layer.name, block.weights[layer.name][first.name])


def _quantize_block(
    inputs: BlockInputs, members: Sequence[LayerSpec], spec: QuantizationSpec
) -> QuantizedBlock:
    """Quantize the layers of a block, and leave them with their first choices."""
    block = QuantizedBlock({}, {})
    for wave in waves(inputs, members):
        _quantize_wave(inputs.runner.model, measure_wave(inputs, wave), spec, block)
        for group in wave:
            _set_first_choices(inputs.runner, group, spec, block)
    return block


def _quantize_wave(
    model: nn.Module,
    wave: Sequence[GroupMoments],
    spec: QuantizationSpec,
    block: QuantizedBlock,
) -> None:
    """Add the candidates of layers that were measured together to the block."""
    jobs = []
    for measured in wave:
        moments = measured.matrix
        if measured.is_starved:
            names = [layer.name for layer in measured.group]
            block.starved.update(dict.fromkeys(names, measured.tokens))
        inverse = damped_inverse(moments) if bool(moments.diagonal().any()) else None
        for layer in measured.group:
            weight = get_linear(model, layer.name).weight.data.float()
            scores = spec.scores.get(layer.name, NO_SCORES)
            pieces = _pieces(spec.candidates(layer), layer.weights, moments.device)
            jobs += [
                _Job(layer.name, weight, fidelities, scores, measured, inverse)
                for fidelities in pieces
            ]

    def work(job: _Job) -> list[tuple[QuantizedWeight, Distortion]]:
        moments = job.measured.matrix
        weights = quantize_candidates(
            job.weight, moments, job.fidelities, spec.rounding, job.scores, job.inverse
        )
        return [
            (weight, distortion(weight, job.weight, moments, job.measured.share))
            for weight in weights
        ]

    device = wave[0].matrix.device
    for job, candidates in zip(jobs, map_on_cores(work, jobs, device), strict=True):
        for fidelity, (candidate, error) in zip(job.fidelities, candidates, strict=True):
            block.errors.setdefault(job.name, {})[fidelity.name] = error
            if fidelity in spec.choices[job.name]:
                block.weights.setdefault(job.name, {})[fidelity.name] = candidate


@dataclass(frozen=True, slots=True)
class _Job:
    """Some candidates of a layer, to be quantized at once.

    Attributes:
        name: name of the layer.
        weight: its weight, float32 [out, in].
        fidelities: how to store it.
        scores: scores that the caller passed.
        measured: moments of its inputs.
        inverse: damped inverse of the moments; None if they are zero.
    """

    name: str
    weight: Tensor
    fidelities: Sequence[Fidelity]
    scores: LayerScores
    measured: GroupMoments
    inverse: Tensor | None


def _pieces(
    fidelities: Sequence[Fidelity], weights: int, device: torch.device
) -> list[Sequence[Fidelity]]:
    """Return the fidelities of a layer in pieces that are quantized at once.

    There is one piece for each core of a CPU, and a single one on a GPU. Pieces are smaller if they
    would take more than `_candidate_bytes`.

    Args:
        fidelities: the fidelities.
        weights: number of weights in the layer.
        device: where the layer is.
    """
    in_memory = _candidate_bytes(device) // (_BYTES_PER_WEIGHT * weights)
    size = max(1, min(-(-len(fidelities) // core_count(device)), in_memory))
    return [fidelities[start : start + size] for start in range(0, len(fidelities), size)]


def _candidate_bytes(device: torch.device) -> int:
    """Return the memory for candidates that are quantized at once.

    A GPU spends its time on launching many small steps, so it takes as many candidates as fit into
    a share of its free memory.
    """
    if device.type == "cpu":
        return CANDIDATE_BYTES
    return max(CANDIDATE_BYTES, int(_GPU_FREE_SHARE * torch.cuda.mem_get_info(device)[0]))
