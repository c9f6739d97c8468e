"""Error-compensated rounding: later columns absorb the rounding errors of earlier ones.

Source: GPTQ, arXiv 2210.17323, section 3, steps 2 and 3. High-impact columns come first. So their
small errors and, above all, the large errors of the low part can still be compensated inside the
low part.

Several fidelities of a layer are quantized together, as each step is small: one matrix product
compensates the errors of all of them. On a CPU, compiled loops take the steps of one fidelity after
those of another.

Options of a fidelity:

* Row scales are fixed before the first group is quantized. So the grid whose errors are
  compensated is always the stored one.
* An outlier stores what has become of its weight when its column's turn comes. So it includes what
  earlier columns left to compensate, and its only error is the rounding to 16 bits.
* An adapter is fitted at the end, to the error that remains.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from quantizer.packed.adapter import fit_adapter
from quantizer.packed.weight import QuantizedWeight
from quantizer.plans.fidelity import COLUMN_MULTIPLE, Fidelity
from quantizer.rounding.candidate import Candidate
from quantizer.rounding.candidate_batch import CandidateBatch
from quantizer.rounding.inverse import damped_inverse


def gptq_layer(
    weight: Tensor,
    hessian: Tensor,
    fidelity: Fidelity,
    impact: Tensor,
    outlier_scores: Tensor | None = None,
    inverse: Tensor | None = None,
) -> QuantizedWeight:
    """Quantize one layer at one fidelity, see `gptq_candidates`."""
    (quantized,) = gptq_candidates(weight, hessian, (fidelity,), (impact,), outlier_scores, inverse)
    return quantized


def gptq_candidates(
    weight: Tensor,
    hessian: Tensor,
    fidelities: Sequence[Fidelity],
    impacts: Sequence[Tensor],
    outlier_scores: Tensor | None = None,
    inverse: Tensor | None = None,
) -> list[QuantizedWeight]:
    """Quantize one layer at each of several fidelities, with the least error of its outputs.

    The objective is tr((W - Q) H (W - Q)'), H being proportional to the sum of x x' over the
    calibration inputs x. Memory: 12 bytes for each weight and fidelity, and 4 bytes for each pair
    of columns and fidelity.

    Args:
        weight: [out, in], finite.
        hessian: second moments of the inputs, symmetric positive semidefinite, [in, in]. With all
            zeros, as for a layer that saw no input, codes are rounded to nearest.
        fidelities: how to store the layer.
        impacts: for each fidelity the score of each input column, see
            `quantizer.rounding.columns.column_impact`, [in].
        outlier_scores: score of each weight, of which the highest become outliers, [out, in]; by
            default `quantizer.packed.outliers.output_error_scores`. Ignored for a fidelity without
            outliers.
        inverse: `damped_inverse(hessian)` if the caller has it; layers with the same inputs share
            it.

    Returns:
        Quantized layers in the order of the fidelities.

    Raises:
        ValueError: the moments are not finite, a score is not a number, or scores have another
            shape than the weight.
    """
    weight = weight.float()
    hessian = hessian.float()
    if not bool(hessian.diagonal().any()):
        hessian = torch.eye(weight.shape[1], device=weight.device)
        inverse = None
    if inverse is None:
        inverse = damped_inverse(hessian)
    candidates = [
        Candidate.prepare(weight, hessian.diagonal(), fidelity, impact, outlier_scores)
        for fidelity, impact in zip(fidelities, impacts, strict=True)
    ]
    batch = CandidateBatch.of(weight, inverse, candidates)
    for start in range(0, weight.shape[1], COLUMN_MULTIPLE):
        batch.fit_grids(start)
        batch.quantize_columns(slice(start, min(start + COLUMN_MULTIPLE, weight.shape[1])))
    return [
        _with_adapter(quantized, weight, hessian, fidelity)
        for quantized, fidelity in zip(batch.finish(), fidelities, strict=True)
    ]


def _with_adapter(
    quantized: QuantizedWeight, weight: Tensor, hessian: Tensor, fidelity: Fidelity
) -> QuantizedWeight:
    """Return the layer with an adapter fitted to its error, if the fidelity has one."""
    if not fidelity.adapter_rank:
        return quantized
    error = weight - quantized.dequantize()
    adapter = fit_adapter(error, hessian, fidelity.stored_adapter_rank(*weight.shape))
    return quantized.with_adapter(fidelity.adapter_rank, adapter)
