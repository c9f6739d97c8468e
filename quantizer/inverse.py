"""The inverse of a layer's second moments, as a factor."""

import torch
from torch import Tensor

DAMPING = 0.01
"""Share of the mean diagonal that is added to the Hessian's diagonal."""
DAMPING_TRIES = 6


def inverse_factor(hessian: Tensor) -> Tensor:
    """Return the upper triangular U with U'U = (H + damping)^-1.

    Damping is `DAMPING` times the mean diagonal, ten times more for each try at which the factorisation fails.

    Raises:
        ValueError: the matrix is not finite, so no damping can help.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError("the second moments of a layer's inputs are not finite: the model overflows on the calibration text")
    eye = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    damping = DAMPING * hessian.diagonal().mean()
    for _ in range(DAMPING_TRIES):
        lower, failed = torch.linalg.cholesky_ex((hessian + damping * eye).flip(0, 1))
        if not failed:
            factor: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
            return factor
        damping *= 10
    raise ValueError("the second moments of a layer's inputs cannot be factorised")
