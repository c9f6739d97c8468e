"""The methods by which the codes of a layer are found, and by which its columns are selected."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantizer.errors import RoundingError
from quantizer.packed.weight import QuantizedWeight
from quantizer.plans.fidelity import SCALE_BITS, Fidelity
from quantizer.rounding.columns import column_impact, random_impact, sparsity_impact
from quantizer.rounding.gptq import gptq_candidates
from quantizer.rounding.rtn import rtn_layer

GPTQ = "gptq"
METHODS = (GPTQ, "rtn")
SELECTIONS = ("hessian", "sparsity", "random", "given")


@dataclass(frozen=True, slots=True)
class Rounding:
    """How the codes of layers are found.

    Attributes:
        method: `gptq`, rounding with errors compensated by later columns, see
            `quantizer.rounding.gptq`; or `rtn`, rounding to nearest, see `quantizer.rounding.rtn`.
        selection: column scores, of which the highest make up the high-impact part. `hessian`: the
            output error of rounding the column, see `quantizer.rounding.columns.column_impact`;
            `sparsity`: the cost of removing the column, see `sparsity_impact` there; `random`: a
            control; `given`: scores that the caller passes, see `LayerScores.columns`.

    Raises:
        RoundingError: a method or selection does not exist.
    """

    method: str = METHODS[0]
    selection: str = SELECTIONS[0]

    def __post_init__(self) -> None:
        """Refuse unknown names."""
        if self.method not in METHODS:
            raise RoundingError(
                f"rounding method {self.method!r} does not exist; use one of {', '.join(METHODS)}"
            )
        if self.selection not in SELECTIONS:
            raise RoundingError(
                f"column selection {self.selection!r} does not exist; use one of "
                f"{', '.join(SELECTIONS)}"
            )

    @property
    def name(self) -> str:
        """Both names, as in `gptq/hessian`; part of the keys of stored results."""
        return f"{self.method}/{self.selection}"


DEFAULT_ROUNDING = Rounding()


@dataclass(frozen=True, slots=True)
class LayerScores:
    """Scores of one layer's columns and weights that the caller passes.

    Attributes:
        columns: scores that select the high-impact columns under `given`, [in]; for example the
            Fisher information of `quantizer.importance.fisher.column_information`.
        weights: scores that select outliers, [out, in]; None to select them by their output error.
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
    """Quantize one layer at each of several fidelities.

    Args:
        weight: float32 [out, in].
        hessian: second moments of the inputs, [in, in]; all zeros mean that no input was seen.
        fidelities: how to store the layer.
        rounding: how to find the codes.
        scores: scores that the caller passes, if any.
        inverse: see `quantizer.rounding.gptq.gptq_candidates`.

    Returns:
        Quantized layers in the order of the fidelities.

    Raises:
        RoundingError: `rounding` needs column scores that are not passed; or a fidelity needs
            `gptq`, as it has coded scales, outliers or an adapter.
    """
    if rounding.method != GPTQ:
        _check_plain(rounding, fidelities)
    by_grid: dict[tuple[int, int, bool], Tensor] = {}
    impacts = []
    for fidelity in fidelities:
        grid = (fidelity.bits_lo, fidelity.group_size, fidelity.ratio > 0)
        if grid not in by_grid:
            by_grid[grid] = _impact(weight, hessian, fidelity, rounding, scores.columns)
        impacts.append(by_grid[grid])
    if rounding.method == GPTQ:
        return gptq_candidates(weight, hessian, fidelities, impacts, scores.weights, inverse)
    return [
        rtn_layer(weight, hessian, fidelity, impact)
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
    (quantized,) = quantize_candidates(weight, hessian, (fidelity,), rounding, scores)
    return quantized


def _check_plain(rounding: Rounding, fidelities: Sequence[Fidelity]) -> None:
    """Refuse fidelities with options that only `gptq` can store."""
    for fidelity in fidelities:
        plain = replace(fidelity, scale_bits=SCALE_BITS[0], outlier_share=0.0, adapter_rank=0)
        if fidelity != plain:
            raise RoundingError(
                f"{rounding.method} cannot store {fidelity.name}: use gptq, or {plain.name}"
            )


def _impact(
    weight: Tensor,
    hessian: Tensor,
    fidelity: Fidelity,
    rounding: Rounding,
    given: Tensor | None,
) -> Tensor:
    """Return the score of each input column that selects the high-impact part, [in]."""
    if not fidelity.ratio:
        return torch.zeros_like(weight[0])
    if rounding.selection == "given":
        if given is None or given.shape != weight.shape[1:]:
            raise RoundingError(
                "columns are to be selected by given scores: give one for each of "
                f"{weight.shape[1]} columns"
            )
        return given
    if rounding.selection == "sparsity":
        return sparsity_impact(weight, hessian)
    if rounding.selection == "random":
        return random_impact(weight.shape[1]).to(weight.device)
    return column_impact(weight, hessian, fidelity.bits_lo, fidelity.group_size)
