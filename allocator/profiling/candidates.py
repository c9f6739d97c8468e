"""Quantized candidates: every layer of a model at every fidelity of a menu."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from allocator.demands.menu import Menu
from allocator.profile import Array
from quantizer.conversion.blocks import QuantizationSpec, quantize_blocks
from quantizer.conversion.quantized_block import Distortion, QuantizedBlock, read_block, read_blocks
from quantizer.durable import PartStore, Progress
from quantizer.plans.fidelity import Fidelity
from quantizer.plans.plan import LayerSpec, by_block
from quantizer.running.moments import Calibration
from quantizer.running.runner import BlockRunner


@dataclass(frozen=True, slots=True)
class Candidates:
    """The quantized candidates of a model, stored block by block by `quantize_candidates`.

    The errors of all candidates are stored. Quantized weights are stored for `kept_fidelities`, or
    for all fidelities if `quantize_candidates` was called so.

    Attributes:
        layers: the L layers of the model.
        menu: the K fidelities and the context.
        store: where the candidates are.
    """

    layers: tuple[LayerSpec, ...]
    menu: Menu
    store: PartStore

    @property
    def kept_fidelities(self) -> tuple[Fidelity, ...]:
        """Fidelities of which weights are always stored: the context, then the menu's two ends."""
        menu = self.menu
        return tuple(dict.fromkeys((menu.fidelities[menu.context], *self.ends)))

    @property
    def ends(self) -> tuple[Fidelity, Fidelity]:
        """The lowest and the highest fidelity of the menu."""
        return self.menu.fidelities[0], self.menu.fidelities[-1]

    @property
    def kept_choices(self) -> dict[str, tuple[Fidelity, ...]]:
        """`kept_fidelities` by layer name."""
        return dict.fromkeys((layer.name for layer in self.layers), self.kept_fidelities)

    def layers_of(self, index: int) -> tuple[LayerSpec, ...]:
        """Return the layers of block `index`."""
        return by_block(self.layers).get(index, ())

    def block(self, index: int) -> QuantizedBlock:
        """Return the candidates of block `index` at `kept_fidelities`.

        Raises:
            PartMissing: they are not in the store.
        """
        return read_block(self.store, self.layers_of(index), self.kept_choices, index)

    def blocks(self, choices: Mapping[str, Sequence[Fidelity]]) -> Iterator[QuantizedBlock]:
        """Yield the candidates of each block at the chosen fidelities.

        Args:
            choices: fidelities by layer name, of those whose weights are stored.

        Raises:
            PartMissing: the candidates of a block are not in the store.
        """
        return read_blocks(self.store, self.layers, choices)

    def errors(self) -> tuple[Array, Array]:
        """Return the errors of all candidates, float64 [L, K] each.

        The first are mean squared output errors, the second relative squared weight errors; see
        `quantizer.conversion.quantized_block.Distortion`.

        Raises:
            PartMissing: the candidates of a block are not in the store.
        """
        stored: dict[str, dict[str, Distortion]] = {}
        for block in self.blocks({layer.name: () for layer in self.layers}):
            stored |= block.errors
        rows = [
            [stored[layer.name][fidelity.name] for fidelity in self.menu.fidelities]
            for layer in self.layers
        ]
        output = np.array([[error.output for error in row] for row in rows])
        weight = np.array([[error.weight for error in row] for row in rows])
        return output, weight


def quantize_candidates(
    runner: BlockRunner,
    candidates: Candidates,
    calibration: Calibration,
    on_progress: Progress,
    *,
    keep_all: bool = False,
) -> None:
    """Quantize every layer at every fidelity of the menu, and leave the model in its context.

    Layers are quantized block by block; each sees the inputs that the layers before it produce in
    the context. Blocks that are stored already are not quantized again.

    Args:
        runner: the model, not quantized.
        candidates: layers, menu, and where the results are stored.
        calibration: windows that layers are quantized on.
        on_progress: called after each block.
        keep_all: whether to store the weights of all fidelities, so that any plan of the menu can
            be assembled from them.
    """
    choices = candidates.kept_choices
    if keep_all:
        choices = {
            name: tuple(dict.fromkeys((*kept, *candidates.menu.fidelities)))
            for name, kept in choices.items()
        }
    quantize_blocks(
        runner,
        candidates.layers,
        QuantizationSpec(choices, measured=candidates.menu.fidelities),
        calibration,
        candidates.store,
        on_progress,
    )
