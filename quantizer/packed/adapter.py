"""Low-rank adapters: what a grid leaves over, in a few directions that matter most at the layer's output.

The adapter of an error E [out, in] under second moments H = L L' is the rank-r matrix BA that
minimises tr((E - BA) H (E - BA)') = |E L - B A L|^2. By Eckart and Young BAL = U U' E L, where U
holds the first r left singular vectors of E L, so BA = U U' E: B = U, A = U' E, and neither L nor H
is inverted. What remains is the sum of the other singular values squared. Source: the whitened
truncation of SVD-LLM, arXiv 2403.07378, section 3.2, applied to the quantization error.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Adapter:
    """Two factors that are added to a layer's weight as b @ a.

    Attributes:
        a: float16 [rank, in].
        b: float16 [out, rank].
    """

    a: Tensor
    b: Tensor


def fit_adapter(error: Tensor, hessian: Tensor, rank: int) -> Adapter:
    """Return the adapter that takes most of `error` away, rounded to 16 bits.

    Args:
        error: the weight less its stored form, finite, [out, in].
        hessian: second moments of the inputs, symmetric positive semidefinite, [in, in].
        rank: at most min(out, in).
    """
    error = error.double()
    b = leading_directions(error, hessian.double(), rank)
    a = b.t() @ error
    # each pair of factors gets one largest entry, so that neither leaves the range of a half
    large_a, large_b = a.abs().amax(1), b.abs().amax(0)
    balance = torch.where(large_a > 0, (large_a / large_b).sqrt(), torch.ones_like(large_a))
    return Adapter((a / balance.unsqueeze(1)).half(), (b * balance).half())


def leading_directions(error: Tensor, hessian: Tensor, rank: int) -> Tensor:
    """Return the first left singular vectors of E L, orthonormal [out, rank], L being any root of H.

    They are eigenvectors of E H E'. Where that is larger than H, they come from the right ones: E L
    V spans the same space.
    """
    if error.shape[0] <= error.shape[1]:
        return _top_eigenvectors(error @ hessian @ error.t(), rank)
    values, vectors = torch.linalg.eigh(hessian)
    whitened = error @ (vectors * values.clamp(min=0).sqrt())
    basis: Tensor = torch.linalg.qr(whitened @ _top_eigenvectors(whitened.t() @ whitened, rank)).Q
    return basis


def _top_eigenvectors(matrix: Tensor, count: int) -> Tensor:
    vectors: Tensor = torch.linalg.eigh(matrix).eigenvectors[:, -count:]
    return vectors


def adapter_weight(adapter: Adapter) -> Tensor:
    """Return b @ a computed in float32, [out, in]."""
    return adapter.b.float() @ adapter.a.float()
