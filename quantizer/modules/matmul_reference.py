"""Products with packed weights in plain PyTorch: dequantize the weight, multiply, discard it.

The tests compare all other implementations with this one.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from quantizer.packed.dequantize import dequantize_tensors
from quantizer.plans.fidelity import Fidelity


def matmul(
    hidden_states: Tensor,
    tensors: Mapping[str, Tensor],
    fidelity: Fidelity,
    out_features: int,
    bias: Tensor | None,
) -> Tensor:
    """Return hidden_states @ W' + bias, with W rounded to the dtype of hidden_states.

    See `quantizer.modules.matmul.matmul`.
    """
    weight = dequantize_tensors(
        tensors, fidelity, out_features, hidden_states.shape[-1], hidden_states.dtype
    )
    return nn.functional.linear(hidden_states, weight, bias).to(hidden_states.dtype)
