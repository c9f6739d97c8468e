"""How a layer's codes are found.

The method that rounds, and what the high-impact columns are chosen by.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantizer.errors import RoundingError
from quantizer.packed.grid import quantize
from quantizer.packed.weight import PartCodes, QuantizedWeight
from quantizer.plans.fidelity import SCALE_BITS, Fidelity
from quantizer.rounding.columns import column_impact, column_order, random_impact, sparsity_impact
from quantizer.rounding.gptq import gptq_candidates
from quantizer.rounding.grids import fit_grid

METHODS = ("gptq", "rtn")
SELECTIONS = ("hessian", "sparsity", "random", "given")


@dataclass(frozen=True, slots=True)
class Rounding:
    """How codes are found.

    Attributes:
        method: `rtn`, each group rounded to the nearest on a grid of searched range; `gptq`,
            rounding that later columns make good, see `quantizer.rounding.gptq`.
        selection: scores of columns, the highest of which make up the high-impact part: `hessian`,
            their output error; `sparsity`, see `quantizer.rounding.columns.sparsity_impact`; `random`, a
            control; `given`, scores from outside, such as the Fisher information of
            `quantizer.column_scores`.

    Raises:
        RoundingError: a name is not one of these.
    """

    method: str = METHODS[0]
    selection: str = SELECTIONS[0]

    def __post_init__(self) -> None:
        """Refuse unknown names."""
        for value, known in ((self.method, METHODS), (self.selection, SELECTIONS)):
            if value not in known:
                raise RoundingError(f"{value!r} is no way to round; use one of {', '.join(known)}")

    @property
    def name(self) -> str:
        """Both names, as in `gptq/hessian`; results are kept under it."""
        return f"{self.method}/{self.selection}"


DEFAULT_ROUNDING = Rounding()


@dataclass(frozen=True, slots=True)
class LayerScores:
    """LayerScores of one layer from outside.

    Attributes:
        columns: what high-impact columns are chosen by where they are given, [in]; see
            `Rounding.selection`.
        weights: what outliers are chosen by, [out, in]; None leaves that to their output error.
    """

    columns: Tensor | None = None
    weights: Tensor | None = None


NO_SCORES = LayerScores()


def quantize_candidates(
    weight: Tensor,
    hessian: Tensor,
    fidelities: Sequence[Fidelity],
    rounding: Rounding = DEFAULT_ROUNDING,
    scores: LayerScores = NO_SCORES,
    inverse: Tensor | None = None,
) -> list[QuantizedWeight]:
    """Quantize one layer at each of some fidelities.

    Args:
        weight: float32 [out, in].
        hessian: second moments of the inputs, [in, in]; all zeros means that nothing is known of
            them.
        fidelities: how to store the layer.
        rounding: how to find the codes.
        scores: scores from outside, where there are any.
        inverse: see `quantizer.rounding.gptq.gptq_candidates`.

    Returns:
        stored forms in the order of the fidelities.

    Raises:
        RoundingError: scores are to be given, and are not; or a fidelity asks for what only `gptq`
            makes: coded scales, outliers, an adapter.
    """
    if rounding.method != METHODS[0]:
        for fidelity in fidelities:
            plain = replace(fidelity, scale_bits=SCALE_BITS[0], outlier_share=0.0, adapter_rank=0)
            if fidelity != plain:
                raise RoundingError(
                    f"{rounding.method} cannot store {fidelity.name}: use gptq, or {plain.name}"
                )
    by_grid: dict[tuple[int, int, bool], Tensor] = {}
    for fidelity in fidelities:
        if _grid_of(fidelity) not in by_grid:
            by_grid[_grid_of(fidelity)] = _impact(
                weight, hessian, fidelity, rounding, scores.columns
            )
    impacts = [by_grid[_grid_of(fidelity)] for fidelity in fidelities]
    if rounding.method == METHODS[0]:
        return gptq_candidates(weight, hessian, fidelities, impacts, scores.weights, inverse)
    return [
        _rounded(weight, hessian, fidelity, impact)
        for fidelity, impact in zip(fidelities, impacts, strict=True)
    ]


def quantize_layer(
    weight: Tensor,
    hessian: Tensor,
    fidelity: Fidelity,
    rounding: Rounding = DEFAULT_ROUNDING,
    scores: LayerScores = NO_SCORES,
) -> QuantizedWeight:
    """Quantize one layer at one fidelity, see `quantize_candidates`."""
    (form,) = quantize_candidates(weight, hessian, (fidelity,), rounding, scores)
    return form


def _grid_of(fidelity: Fidelity) -> tuple[int, int, bool]:
    """Return what of a fidelity decides which columns have which impact."""
    return fidelity.bits_lo, fidelity.group_size, fidelity.ratio > 0


def _rounded(
    weight: Tensor, hessian: Tensor, fidelity: Fidelity, impact: Tensor
) -> QuantizedWeight:
    """Round each group to the nearest on its own grid."""
    importance = hessian.diagonal() if bool(hessian.diagonal().any()) else torch.ones_like(impact)
    columns = column_order(impact, importance, fidelity)
    ordered, importance = weight[:, columns], importance[columns]
    parts, start = [], 0
    for count, bits in fidelity.parts(ordered.shape[1]):
        codes, scales, zeros = [], [], []
        for at in range(start, start + count, fidelity.group_size):
            place = slice(at, min(at + fidelity.group_size, start + count))
            scale, zero = fit_grid(ordered[:, place], bits, importance[place])
            codes.append(quantize(ordered[:, place], scale, zero, bits))
            scales.append(scale[:, 0])
            zeros.append(zero[:, 0])
        parts.append(PartCodes(torch.cat(codes, 1), torch.stack(scales), torch.stack(zeros)))
        start += count
    return QuantizedWeight.from_codes(fidelity, columns, tuple(parts))


def _impact(
    weight: Tensor, hessian: Tensor, fidelity: Fidelity, rounding: Rounding, scores: Tensor | None
) -> Tensor:
    if not fidelity.ratio:
        return torch.zeros_like(weight[0])
    if rounding.selection == "given":
        if scores is None or scores.shape != weight.shape[1:]:
            raise RoundingError(
                "columns are to be chosen by given scores: give one for each of "
                f"{weight.shape[1]} columns"
            )
        return scores
    if rounding.selection == "sparsity":
        return sparsity_impact(weight, hessian)
    if rounding.selection == "random":
        return random_impact(weight.shape[1]).to(weight.device)
    return column_impact(weight, hessian, fidelity.bits_lo, fidelity.group_size)
