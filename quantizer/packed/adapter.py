"""Low-rank adapters: the correction of rank r that lowers the layer's output error most.

Let E [out, in] be the quantization error and H = L L' the second moments of the inputs. The adapter
is the matrix BA of rank r that minimises tr((E - BA) H (E - BA)') = |E L - B A L|^2. By Eckart and
Young B A L = U U' E L, where U holds the first r left singular vectors of E L. So B = U and
A = U' E, and neither L nor H is inverted. The error that remains is the sum of the other squared
singular values. Source: the whitened truncation of SVD-LLM, arXiv 2403.07378, section 3.2, applied
to the quantization error.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Adapter:
    """Two factors whose product b @ a is added to a layer's weight.

    Attributes:
        a: float16 [rank, in].
        b: float16 [out, rank].
    """

    a: Tensor
    b: Tensor


def fit_adapter(error: Tensor, hessian: Tensor, rank: int) -> Adapter:
    """Return the adapter that reduces the output error most, rounded to float16.

    Args:
        error: the weight minus its quantized value, finite, [out, in].
        hessian: second moments of the inputs, symmetric positive semidefinite, [in, in].
        rank: at most min(out, in).
    """
    error = error.double()
    b = leading_directions(error, hessian.double(), rank)
    a = b.t() @ error
    # both factors of a rank get the same largest entry, so that neither leaves the float16 range
    large_a, large_b = a.abs().amax(1), b.abs().amax(0)
    balance = torch.where(large_a > 0, (large_a / large_b).sqrt(), torch.ones_like(large_a))
    return Adapter((a / balance.unsqueeze(1)).half(), (b * balance).half())


def leading_directions(error: Tensor, hessian: Tensor, rank: int) -> Tensor:
    """Return the first left singular vectors of E L, orthonormal [out, rank], for any H = L L'.

    They are the leading eigenvectors of E H E'. If that matrix is larger than H, they are computed
    from the right singular vectors V instead, as E L V spans the same space.
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
