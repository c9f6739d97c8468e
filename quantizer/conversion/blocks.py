"""Quantize a model block by block, each block seeing the inputs that the already quantized blocks give it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from safetensors.torch import load, save
from torch import Tensor

from quantizer.durable import PartStore, Progress
from quantizer.errors import PartMissing
from quantizer.modules.linear import get_linear, set_dequantized_weight
from quantizer.packed.weight import QuantizedWeight
from quantizer.plans.fidelity import Fidelity
from quantizer.plans.plan import LayerSpec, by_block
from quantizer.rounding.inverse import damped_inverse
from quantizer.rounding.methods import DEFAULT_ROUNDING, LayerScores, Rounding, quantize_candidates
from quantizer.running.moments import Calibration, input_groups, input_moments
from quantizer.running.runner import BlockRunner

METHOD = "gptq-6"
"""Names what this module and those below it compute.

A change of their results gets a new name: no stale result is reused.
"""

STACK_BYTES = 2**28
"""What the fidelities of a layer that are quantized at once may take together.

More on a GPU, see `_stack_bytes`.
"""
_FREE_SHARE = 1 / 4
"""Share of a GPU's free memory that they may take."""
_STACKED = 12
"""Bytes of each weight at each of them."""

_ERRORS = "errors"

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Distortion:
    """How far a stored form of a layer is from the original weight W, with E = stored - W.

    Attributes:
        output: tr(E M E') with M the mean of x x' over calibration inputs x: the mean squared error
            of the layer's output.
        weight: |E|^2 / |W|^2, both Frobenius norms.
    """

    output: float
    weight: float


@dataclass(frozen=True, slots=True)
class QuantizedBlock:
    """What quantizing one block gave.

    Attributes:
        weights: stored forms by layer name and fidelity name.
        errors: of every form that was made, kept or not, by layer name and fidelity name.
    """

    weights: dict[str, dict[str, QuantizedWeight]]
    errors: dict[str, dict[str, Distortion]]


def quantize_blocks(
    runner: BlockRunner,
    layers: Sequence[LayerSpec],
    choices: Mapping[str, Sequence[Fidelity]],
    calibration: Calibration,
    parts: PartStore,
    on_progress: Progress,
    scored: Sequence[Fidelity] = (),
    rounding: Rounding = DEFAULT_ROUNDING,
    scores: Mapping[str, LayerScores] | None = None,
) -> None:
    """Quantize every layer at each fidelity in `choices`, and leave the model running with the first of them.

    Blocks are taken in order. Inside a block, layers are taken in the order in which they are
    called, and see what the layers before them give once quantized at the first choice. The model's
    weights are overwritten by dequantized ones; the stored forms go to `parts`, one part for each
    block, and are read by `read_block`. Blocks that `parts` already holds are not quantized again.

    Args:
        runner: the model, unquantized.
        layers: the layers to quantize.
        choices: fidelities by layer name, at least one each.
        calibration: what the model is run on.
        parts: where finished blocks are kept.
        on_progress: told of each finished block.
        scored: further fidelities for all layers, of which only the errors are kept.
        rounding: how codes are found.
        scores: scores from outside, by layer name.
    """
    batches = calibration.batches()
    hidden = [runner.initial_states(batch) for batch in batches]
    by_index = by_block(layers)
    count = len(runner.blocks)
    for index in range(count):
        members = by_index.get(index, ())
        stored = find_block(parts, members, choices, index)
        if stored is None:
            make = partial(_quantize_candidates, rounding=rounding)
            stored = _quantize_block(
                runner, members, choices, scored, batches, hidden, index, make, scores or {}
            )
            parts.write(_part_name(index), _encode(stored))
        else:
            for layer in members:
                set_dequantized_weight(
                    runner.model,
                    layer.name,
                    stored.weights[layer.name][choices[layer.name][0].name],
                )
        hidden = runner.advance(batches, hidden, index)
        on_progress(index + 1, count)


def find_block(
    parts: PartStore,
    layers: Sequence[LayerSpec],
    choices: Mapping[str, Sequence[Fidelity]],
    index: int,
) -> QuantizedBlock | None:
    """Return what `parts` holds of block `index`, or None if it is not there.

    Args:
        parts: where `quantize_blocks` kept it.
        layers: the layers of that block.
        choices: the fidelities that `quantize_blocks` was given.
        index: which block.
    """
    data = parts.read(_part_name(index))
    if data is None:
        return None
    tensors = load(data)
    weights: dict[str, dict[str, QuantizedWeight]] = {}
    for layer in layers:
        for fidelity in choices[layer.name]:
            prefix = f"{layer.name}|{fidelity.name}|"
            own = {
                key.removeprefix(prefix): tensor
                for key, tensor in tensors.items()
                if key.startswith(prefix)
            }
            weight = QuantizedWeight(fidelity, layer.out_features, layer.in_features, own)
            weights.setdefault(layer.name, {})[fidelity.name] = weight
    errors: dict[str, dict[str, Distortion]] = {layer.name: {} for layer in layers}
    for key, tensor in tensors.items():
        kind, name, fidelity_name = key.split("|")
        if kind == _ERRORS and name in errors:
            errors[name][fidelity_name] = Distortion(*tensor.tolist())
    return QuantizedBlock(weights, errors)


def read_block(
    parts: PartStore,
    layers: Sequence[LayerSpec],
    choices: Mapping[str, Sequence[Fidelity]],
    index: int,
) -> QuantizedBlock:
    """Return what `parts` holds of block `index`, see `find_block`.

    Raises:
        PartMissing: the block is not there.
    """
    block = find_block(parts, layers, choices, index)
    if block is None:
        raise PartMissing(
            f"the quantized weights of block {index} are missing or damaged: run again, and the "
            "block is quantized anew"
        )
    return block


def read_blocks(
    parts: PartStore, layers: Sequence[LayerSpec], choices: Mapping[str, Sequence[Fidelity]]
) -> Iterator[QuantizedBlock]:
    """Yield what `parts` holds of each block that contains one of the layers, in block order.

    Args:
        parts: where `quantize_blocks` kept the blocks.
        layers: all layers of those blocks.
        choices: the fidelities that `quantize_blocks` was given, or some of them, by layer name.

    Raises:
        PartMissing: a block is not there.
    """
    for index, members in by_block(layers).items():
        yield read_block(parts, members, choices, index)


def _encode(block: QuantizedBlock) -> bytes:
    tensors = {
        f"{_ERRORS}|{layer}|{fidelity}": torch.tensor(
            [error.output, error.weight], dtype=torch.float64
        )
        for layer, by_fidelity in block.errors.items()
        for fidelity, error in by_fidelity.items()
    }
    for layer, by_fidelity in block.weights.items():
        for fidelity, weight in by_fidelity.items():
            tensors |= {
                f"{layer}|{fidelity}|{name}": tensor for name, tensor in weight.tensors.items()
            }
    data: bytes = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
    return data


def _part_name(index: int) -> str:
    return f"block-{index:04d}"


def _quantize_block(
    runner: BlockRunner,
    members: Sequence[LayerSpec],
    choices: Mapping[str, Sequence[Fidelity]],
    scored: Sequence[Fidelity],
    batches: Sequence[Tensor],
    hidden: Sequence[Tensor],
    index: int,
    make: Callable[..., list[tuple[QuantizedWeight, Distortion]]],
    scores: Mapping[str, LayerScores],
) -> QuantizedBlock:
    block = QuantizedBlock({}, {})
    for group in input_groups(runner, members, batches[0], hidden[0], index):
        moments = input_moments(runner, group[0], batches, hidden, index)
        inverse = damped_inverse(moments) if bool(moments.diagonal().any()) else None
        weights = {
            layer.name: get_linear(runner.model, layer.name).weight.data.float() for layer in group
        }
        tasks = [
            (layer, piece)
            for layer in group
            for piece in _pieces(
                tuple(dict.fromkeys((*choices[layer.name], *scored))), layer.weights, moments.device
            )
        ]
        items = [
            (weights[layer.name], piece, scores.get(layer.name, LayerScores()))
            for layer, piece in tasks
        ]
        made = _in_parallel(partial(make, moments=moments, inverse=inverse), items)
        for (layer, piece), results in zip(tasks, made, strict=True):
            for option, (form, error) in zip(piece, results, strict=True):
                block.errors.setdefault(layer.name, {})[option.name] = error
                if option in choices[layer.name]:
                    block.weights.setdefault(layer.name, {})[option.name] = form
        for layer in group:
            set_dequantized_weight(
                runner.model, layer.name, block.weights[layer.name][choices[layer.name][0].name]
            )
    return block


def _quantize_candidates(
    weight: Tensor,
    fidelities: Sequence[Fidelity],
    scores: LayerScores,
    rounding: Rounding,
    moments: Tensor,
    inverse: Tensor | None,
) -> list[tuple[QuantizedWeight, Distortion]]:
    forms = quantize_candidates(weight, moments, fidelities, rounding, scores, inverse)
    return [(form, distortion(form, weight, moments)) for form in forms]


def _pieces(
    fidelities: Sequence[Fidelity], weights: int, device: torch.device
) -> list[Sequence[Fidelity]]:
    """Return the fidelities of a layer of so many weights in pieces that are quantized at once.

    One for each core, or all on a GPU.

    Pieces are smaller where they would take more than `_stack_bytes`.
    """
    pieces = torch.get_num_threads() if device.type == "cpu" else 1
    size = max(1, min(-(-len(fidelities) // pieces), _stack_bytes(device) // (_STACKED * weights)))
    return [fidelities[at : at + size] for at in range(0, len(fidelities), size)]


def _stack_bytes(device: torch.device) -> int:
    """Return `STACK_BYTES`; on a GPU, whose time goes into launching many small steps, a share of its free memory."""
    if device.type == "cpu":
        return STACK_BYTES
    return max(STACK_BYTES, int(_FREE_SHARE * torch.cuda.mem_get_info(device)[0]))


Item = tuple[Tensor, Sequence[Fidelity], LayerScores]


def _in_parallel(
    work: Callable[[Tensor, Sequence[Fidelity], LayerScores], R], items: Sequence[Item]
) -> list[R]:
    """Return `work` of each item; on a CPU one item a core, each on one thread.

    Quantizing is many small steps: threads that share one of them wait for each other more than
    they work, above all when another program has one of the cores.
    """
    threads = torch.get_num_threads()
    if items[0][0].device.type != "cpu" or threads == 1:
        return [work(*item) for item in items]
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(work, *zip(*items, strict=True)))
    finally:
        torch.set_num_threads(threads)


def distortion(form: QuantizedWeight, weight: Tensor, moments: Tensor) -> Distortion:
    """Return the errors of a stored form.

    Args:
        form: the stored form.
        weight: what it stands for, [out, in].
        moments: mean of x x' over the layer's inputs, [in, in].
    """
    error = form.dequantize() - weight
    size = float(weight.square().sum())
    return Distortion(
        float(((error @ moments) * error).sum()),
        float(error.square().sum()) / size if size else 0.0,
    )
