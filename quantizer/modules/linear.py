"""The packed module that takes the place of a quantized `nn.Linear`."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from quantizer.errors import PlanError
from quantizer.modules.matmul import matmul, prepare
from quantizer.modules.tensor_cache import TensorCache
from quantizer.packed.dequantize import dequantize_tensors
from quantizer.packed.layout import tensor_specs
from quantizer.packed.weight import QuantizedWeight
from quantizer.plans.fidelity import Fidelity


class QuantizedLinear(nn.Linear):
    """A linear layer whose weight stays packed; see `quantizer.modules.matmul` for its products.

    Buffers have the names of `QuantizedWeight.tensors`; the bias is the original one. It is an
    `nn.Linear`, so that libraries can attach adapters to it, but its `weight` is None: code that
    would change a weight in place fails instead of having no effect.
    """

    def __init__(
        self,
        fidelity: Fidelity,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        dtype: torch.dtype,
    ) -> None:
        """Allocate a layer of this shape, to be filled from a state dict."""
        super().__init__(in_features, out_features, bias=False, device="meta")
        self.fidelity = fidelity
        self.register_parameter("weight", None)
        for name, spec in tensor_specs(fidelity, out_features, in_features).items():
            self.register_buffer(name, torch.zeros(spec.shape, dtype=spec.dtype))
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype), requires_grad=False)
        self._cache = TensorCache()

    @classmethod
    def from_linear(cls, linear: nn.Linear, weight: QuantizedWeight) -> "QuantizedLinear":
        """Return a packed layer with the given weight, and the bias and device of `linear`."""
        has_bias = linear.bias is not None
        module = cls(
            weight.fidelity,
            weight.in_features,
            weight.out_features,
            bias=has_bias,
            dtype=linear.weight.dtype,
        )
        for name, tensor in weight.tensors.items():
            module.register_buffer(name, tensor.contiguous())
        if has_bias:
            module.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        return module.to(linear.weight.device)

    @property
    def qweight(self) -> Tensor:
        """Codes of the low part.

        PEFT looks for an attribute of this name to find the device for an adapter.
        """
        return self.get_buffer("low_codes")

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight [out, in] in `dtype`."""
        buffers = dict(self.named_buffers(recurse=False))
        return dequantize_tensors(
            buffers, self.fidelity, self.out_features, self.in_features, dtype
        )

    def prepare(self) -> None:
        """Prepare products, once the tensors are loaded."""
        prepare(self._buffers, self.fidelity, self.in_features, self._cache)  # type: ignore[arg-type]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return hidden_states @ W' + bias; [..., in] to [..., out]."""
        return matmul(
            hidden_states,
            self._buffers,  # type: ignore[arg-type]
            self.fidelity,
            self.out_features,
            self.bias,
            self._cache,
        )

    def extra_repr(self) -> str:
        """Describe the layer in a printed model."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"fidelity={self.fidelity.name}"
        )


def replace_linear(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the submodule called `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def get_linear(model: nn.Module, name: str) -> nn.Linear:
    """Return the linear layer called `name`.

    Raises:
        PlanError: the model has no such module, or it is not an `nn.Linear`.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError as err:
        raise PlanError(
            f"the model has no layer {name!r}; the plan was made for another model"
        ) from err
    if not isinstance(module, nn.Linear) or isinstance(module, QuantizedLinear):
        raise PlanError(
            f"layer {name!r} is a {type(module).__name__}, not a linear layer; the plan was made "
            "for another model"
        )
    return module


def pack_layers(model: nn.Module, weights: Mapping[str, QuantizedWeight]) -> None:
    """Replace linear layers of `model` by packed ones, in place.

    Args:
        model: changed in place.
        weights: stored weight of each layer, by the name of the layer.

    Raises:
        PlanError: see `get_linear`.
    """
    for name, weight in weights.items():
        replace_linear(model, name, QuantizedLinear.from_linear(get_linear(model, name), weight))


def set_dequantized_weight(model: nn.Module, name: str, weight: QuantizedWeight) -> None:
    """Overwrite the weight of the linear layer called `name` by the dequantized `weight`.

    Raises:
        PlanError: see `get_linear`.
    """
    linear = get_linear(model, name)
    linear.weight.data = weight.to(linear.weight.device).dequantize(linear.weight.dtype)
