"""The inverse of the second moments of a layer's inputs, and its triangular factor."""

import torch
from torch import Tensor

DAMPING = 0.01
"""Share of the mean diagonal that is added to the diagonal of the Hessian."""
DAMPING_TRIES = 6


def damped_inverse(hessian: Tensor) -> Tensor:
    """Return (H + damping * I)^-1, float64.

    The damping is `DAMPING` times the mean diagonal, and ten times more after each failed
    factorisation. It does not depend on the order of columns, so one inverse serves all orders.

    Raises:
        ValueError: the matrix is not finite, or cannot be factorised with any damping.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError(
            "the second moments of a layer's inputs are not finite: the model overflows on the "
            "calibration text"
        )
    exact = hessian.double()
    damping = DAMPING * exact.diagonal().mean()
    for _ in range(DAMPING_TRIES):
        lower, failed = torch.linalg.cholesky_ex(
            exact + damping * torch.eye(len(exact), dtype=exact.dtype, device=exact.device)
        )
        if not failed:
            inverse: Tensor = torch.cholesky_inverse(lower)
            return inverse
        damping *= 10
    raise ValueError("the second moments of a layer's inputs cannot be factorised")


def upper_factor(inverse: Tensor, columns: Tensor) -> Tensor:
    """Return the upper triangular U with U'U = inverse[columns][:, columns], float32.

    Computed in float32, and in the precision of `inverse` if that fails.
    """
    # index_select takes a fifth of the time of inverse[columns][:, columns]
    ordered = inverse.float().index_select(0, columns).index_select(1, columns)
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(ordered, upper=True)
    if failed:
        factor = torch.linalg.cholesky(inverse[columns][:, columns], upper=True).float()
    return factor
