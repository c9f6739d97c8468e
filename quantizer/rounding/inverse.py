"""The inverse of a layer's second moments, and its factor."""

import torch
from torch import Tensor

DAMPING = 0.01
"""Share of the mean diagonal that is added to the Hessian's diagonal."""
DAMPING_TRIES = 6


def damped_inverse(hessian: Tensor) -> Tensor:
    """Return (H + damping)^-1, float64.

    It serves all column orders, as damping does not depend on the order.

    Damping is `DAMPING` times the mean diagonal, ten times more for each try at which the
    factorisation fails.

    Raises:
        ValueError: the matrix is not finite, so no damping can help.
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
    """Return the upper triangular U with U'U = inverse[columns][:, columns], float32."""
    factor: Tensor
    ordered = (
        inverse.float().index_select(0, columns).index_select(1, columns)
    )  # five times as fast as [columns][:, columns]
    factor, failed = torch.linalg.cholesky_ex(ordered, upper=True)
    return (
        torch.linalg.cholesky(inverse[columns][:, columns], upper=True).float()
        if failed
        else factor
    )
