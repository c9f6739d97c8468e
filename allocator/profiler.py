"""Measure the effect of each layer and fidelity on the model's output, around a uniform context near the budget.

1. The model is quantized block by block at the context fidelity; each layer is also quantized at the two ends of the menu.
2. One layer at a time takes each end of the menu, the others staying in the context, and the change of the output is measured
   on a few windows. Only the blocks from the changed one on are run.
3. Fidelities between the ends are interpolated: a split that moves a share f of a layer's remaining column error has f times the
   effect, plus an uncorrelated rest of f (1 - f) times the squared effect, as for independent columns.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from allocator.menu import Menu
from allocator.profile import Array, Profile
from allocator.sketch import OutputMetric, output_metric
from quantizer.convert import Calibration, install, quantize_blocks, read_block
from quantizer.durable import PartStore, Progress
from quantizer.fidelity import Fidelity
from quantizer.plan import LayerSpec
from quantizer.runner import BlockRunner

METHOD = "output-2"
"""Names what this module computes; a change of its results gets a new name, so that no stale profile is reused."""

_FEWEST_LAYERS = 8
"""With fewer layers, there is too little to tell noise from signal by."""

KEPT_TRACE = 0.999
"""Share of the coupling's trace that the stored factor keeps."""


@dataclass(frozen=True, slots=True)
class ProfileSpec:
    """How effects are measured.

    Attributes:
        probes: token windows on which outputs are compared, int64 [windows, tokens]; text that layers were not quantized on, since
            their errors are smaller there than anywhere else.
        width: numbers kept for each token's output change.
        seed: of the random projection.
        shrink: whether first-order terms are shrunk by what of them is noise, see `shrink_noise`.
    """

    probes: Tensor
    width: int
    seed: int
    shrink: bool = True


@dataclass(frozen=True, slots=True)
class ProfileProgress:
    """Whom to tell of each finished block of the two long steps."""

    quantize: Progress
    measure: Progress


@dataclass(frozen=True, slots=True)
class Effects:
    """Measured effects of the 2 L single changes: layer l to the low end at 2 l, to the high end at 2 l + 1.

    Attributes:
        first: first-order KL change of each token, float64 [2 L, N], [nats].
        sketch: float32 [2 L, N * width].
        context_loss: mean KL of the context, [nats/token].
    """

    first: Array
    sketch: Tensor
    context_loss: float


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
) -> Profile:
    """Return the profile of a model; its weights are left in the context.

    Args:
        runner: the model, unquantized.
        layers: its layers.
        menu: fidelities and context.
        calibration: windows that layers are quantized on.
        spec: how effects are measured, and on which windows.
        parts: where finished blocks are kept, for a later run to take up.
        progress: told of finished blocks.
        model_sha256: recorded in the profile.
        calibration_sha256: recorded in the profile.
    """
    probes = spec.probes
    original = _kept(parts, "original", lambda: runner.head_input(probes, runner.enter(probes), 0))
    ends = menu.fidelities[0], menu.fidelities[-1]
    choices = {layer.name: (menu.fidelities[menu.context], *ends) for layer in layers}
    quantize_blocks(runner, layers, choices, calibration, parts, progress.quantize)
    effects = _measure(runner, layers, choices, original, spec, parts, progress.measure)
    if spec.shrink:
        effects = shrink_noise(effects)
    impact = _impacts(layers, choices, parts)
    linear, factor, truncation = assemble(layers, menu, effects, impact)
    return Profile(
        layers=tuple(layers),
        fidelities=menu.fidelities,
        context=menu.context,
        context_loss=effects.context_loss,
        linear=linear,
        factor=factor,
        truncation=truncation,
        tokens=probes.numel(),
        model_sha256=model_sha256,
        calibration_sha256=calibration_sha256,
    )


def interpolation(fidelity: Fidelity, menu: Menu, impact: Tensor) -> tuple[float, float]:
    """Return the shares (towards the low end, towards the high end) of a layer's measured changes that `fidelity` amounts to.

    With columns sorted by impact, going from the context's n columns at high width to m > n moves the columns n .. m-1, and so the
    share of their impact in the impact of all columns from n on; m < n correspondingly.

    Args:
        fidelity: a member of the menu.
        menu: whose ends were measured.
        impact: column scores of the layer, [in].
    """
    falling = impact.double().sort(descending=True).values
    columns = len(falling)
    here = menu.fidelities[menu.context].high_columns(columns)
    ends = {menu.fidelities[0]: 0, menu.fidelities[-1]: columns}
    there = ends.get(fidelity, fidelity.high_columns(columns))
    if there == here:
        return 0.0, 0.0
    moved, movable = (falling[there:here], falling[:here]) if there < here else (falling[here:there], falling[here:])
    share = float(moved.sum() / movable.sum()) if float(movable.sum()) > 0 else len(moved) / len(movable)
    return (share, 0.0) if there < here else (0.0, share)


def shrink_noise(effects: Effects) -> Effects:
    """Pull noisy first-order terms towards what the size of the effect alone would predict (empirical Bayes).

    Errors that do not know of each other give a first-order term proportional to the squared effect, f = b s, with b fitted through
    the origin for each end of the menu. What deviates from that line is kept as far as two halves of the tokens agree on it: with
    residuals r1, r2 of the halves over all layers, the share cov(r1, r2) / var((r1 + r2) / 2), between 0 and 1.
    """
    tokens = effects.first.shape[1]
    half = tokens // 2
    own = effects.sketch.square().sum(1).double().numpy() / tokens
    first = effects.first.copy()
    for end in (0, 1):
        mean, size = effects.first[end::2].mean(axis=1), own[end::2]
        if half == 0 or len(mean) < _FEWEST_LAYERS or not size.any():
            continue
        line = size * (mean @ size) / (size @ size)
        halves = [effects.first[end::2, :half].mean(axis=1) - line, effects.first[end::2, half:].mean(axis=1) - line]
        spread = float(np.var((halves[0] + halves[1]) / 2))
        agreed = float(np.cov(halves[0], halves[1], ddof=0)[0, 1])
        kept = min(max(agreed / spread, 0.0), 1.0) if spread > 0 else 1.0
        first[end::2] += ((1 - kept) * (line - mean))[:, None]
    return replace(effects, first=first)


def assemble(layers: Sequence[LayerSpec], menu: Menu, effects: Effects, impact: dict[str, Tensor]) -> tuple[Array, Array, float]:
    """Return (linear [L, K], factor [rank, L * K], truncation) of the loss model, see `allocator.profile`.

    Single changes to the ends keep their measured loss, whatever the rank of the factor.
    """
    tokens = effects.first.shape[1]
    gram = (effects.sketch @ effects.sketch.t()).double().numpy() / tokens  # [2 L, 2 L]
    values, vectors = np.linalg.eigh(gram)
    values, vectors = values[::-1].clip(min=0), vectors[:, ::-1]
    trace = values.sum()
    rank = int(np.searchsorted(np.cumsum(values), KEPT_TRACE * trace) + 1) if trace > 0 else 1
    base = (vectors[:, :rank] * np.sqrt(values[:rank])).T  # [rank, 2 L]
    own, kept = np.diag(gram), np.square(base).sum(axis=0)
    first = effects.first.mean(axis=1)
    count = len(menu.fidelities)
    linear, factor = np.zeros((len(layers), count)), np.zeros((rank, len(layers), count))
    for row, layer in enumerate(layers):
        for column, fidelity in enumerate(menu.fidelities):
            for end, share in enumerate(interpolation(fidelity, menu, impact[layer.name])):
                at = 2 * row + end
                factor[:, row, column] += share * base[:, at]
                rest = share * own[at] - share**2 * kept[at]
                linear[row, column] += share * first[at] + rest / 2
    return linear, factor.reshape(rank, -1), float(1 - values[:rank].sum() / trace) if trace > 0 else 0.0


def _measure(
    runner: BlockRunner,
    layers: Sequence[LayerSpec],
    choices: Mapping[str, Sequence[Fidelity]],
    original: Tensor,
    spec: ProfileSpec,
    parts: PartStore,
    on_progress: Progress,
) -> Effects:
    """Measure both end changes of every layer, block by block, in the context."""
    probes = spec.probes
    states = [runner.enter(probes)]
    for index in range(len(runner.blocks)):
        states.append(runner.blocks_between(probes, states[-1], index, index + 1))
    context = runner.head_input(probes, states[-1], len(runner.blocks))
    generator = torch.Generator().manual_seed(spec.seed)
    metric = output_metric(runner, probes, context, original, spec.width, generator)
    firsts, sketches = [], []
    for index in range(len(runner.blocks)):
        members = [layer for layer in layers if layer.block == index]
        data = parts.read(f"effects-{index:04d}")
        if data is None:
            first, sketch = _measure_block(runner, members, choices, probes, states[index], context, metric, parts, index)
            data = save({"first": first, "sketch": sketch})
            parts.write(f"effects-{index:04d}", data)
        stored = load(data)
        firsts.append(stored["first"])
        sketches.append(stored["sketch"])
        on_progress(index + 1, len(runner.blocks))
    return Effects(torch.cat(firsts).double().numpy(), torch.cat(sketches), float(metric.kl.mean()))


def _measure_block(
    runner: BlockRunner,
    members: Sequence[LayerSpec],
    choices: Mapping[str, Sequence[Fidelity]],
    probes: Tensor,
    hidden: Tensor,
    context: Tensor,
    metric: OutputMetric,
    parts: PartStore,
    index: int,
) -> tuple[Tensor, Tensor]:
    stored = read_block(parts, members, choices, index)
    if stored is None:
        raise RuntimeError(f"block {index} was quantized, but its stored form is gone")
    firsts, sketches = [], []
    for layer in members:
        here, *ends = choices[layer.name]
        for end in ends:
            install(runner.model, layer.name, stored.weights[layer.name][end.name])
            change = (runner.head_input(probes, hidden, index) - context).float().flatten(0, 1)
            first, sketch = metric.measure(change)
            firsts.append(first.cpu())
            sketches.append(sketch.flatten().cpu())
        install(runner.model, layer.name, stored.weights[layer.name][here.name])
    return torch.stack(firsts), torch.stack(sketches)


def _impacts(layers: Sequence[LayerSpec], choices: Mapping[str, Sequence[Fidelity]], parts: PartStore) -> dict[str, Tensor]:
    impact: dict[str, Tensor] = {}
    for index in sorted({layer.block for layer in layers}):
        block = read_block(parts, [layer for layer in layers if layer.block == index], choices, index)
        if block is None:
            raise RuntimeError(f"block {index} was quantized, but its stored form is gone")
        impact |= block.impact
    return impact


def _kept(parts: PartStore, name: str, make: Callable[[], Tensor]) -> Tensor:
    data = parts.read(name)
    if data is None:
        data = save({"tensor": make().contiguous().cpu()})
        parts.write(name, data)
    return load(data)["tensor"]
