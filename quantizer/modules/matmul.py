"""Products with packed weights, each by the way that `quantizer.kernels.path` chooses."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantizer.kernels.path import CPU, GPU, choose_kernel_path
from quantizer.modules import matmul_reference
from quantizer.modules.tensor_cache import TensorCache
from quantizer.packed.layout import tensor_specs
from quantizer.packed.weight import dequantize_tensors
from quantizer.plans.fidelity import Fidelity


def prepare(
    tensors: Mapping[str, Tensor], fidelity: Fidelity, in_features: int, cache: TensorCache
) -> None:
    """Make what the products of a layer will share, where they share anything."""
    device = next(iter(tensors.values())).device.type
    if device == "cpu" and choose_kernel_path(device).name == CPU:
        from quantizer.modules import matmul_cpu  # noqa: PLC0415  see below

        matmul_cpu.prepare(tensors, fidelity, in_features, cache)


def matmul(
    hidden_states: Tensor,
    tensors: Mapping[str, Tensor],
    fidelity: Fidelity,
    out_features: int,
    bias: Tensor | None = None,
    cache: TensorCache | None = None,
) -> Tensor:
    """Return hidden_states @ W' + bias, [..., in] to [..., out], in the dtype of hidden_states.

    Differentiable in hidden_states and bias, once. The weight is expanded for the backward pass and
    not kept for it.

    Args:
        hidden_states: floats, on the device of the tensors.
        tensors: stored tensors of a layer by name, see `quantizer.packed.weight.QuantizedWeight`; others
            are ignored.
        fidelity: how the layer is stored.
        out_features: rows of the weight.
        bias: [out].
        cache: what the products of this layer share.

    Raises:
        KernelError: see `quantizer.kernels.path.choose_kernel_path`.
    """
    differentiable = hidden_states.requires_grad or (bias is not None and bias.requires_grad)
    if torch.compiler.is_compiling() or (differentiable and torch.is_grad_enabled()):
        names = tensor_specs(fidelity, out_features, hidden_states.shape[-1])
        product: Tensor = _opaque(
            hidden_states, [tensors[name] for name in names], fidelity.name, out_features, bias
        )
        return product
    return _run(hidden_states, tensors, fidelity, out_features, bias, cache)


def _run(
    hidden_states: Tensor,
    tensors: Mapping[str, Tensor],
    fidelity: Fidelity,
    out_features: int,
    bias: Tensor | None,
    cache: TensorCache | None = None,
) -> Tensor:
    name = choose_kernel_path(hidden_states.device.type).name
    if name == CPU:
        from quantizer.modules import matmul_cpu  # noqa: PLC0415  numba takes a while to import, and may be missing

        return matmul_cpu.matmul(hidden_states, tensors, fidelity, out_features, bias, cache)
    if name == GPU:
        from quantizer.modules import matmul_gpu  # noqa: PLC0415  so may Triton

        return matmul_gpu.matmul(hidden_states, tensors, fidelity, out_features, bias)
    return matmul_reference.matmul(hidden_states, tensors, fidelity, out_features, bias)


@torch.library.custom_op("bitwright::matmul", mutates_args=())
def _opaque(
    hidden_states: Tensor,
    tensors: list[Tensor],
    fidelity: str,
    out_features: int,
    bias: Tensor | None,
) -> Tensor:
    """Do the same where neither autograd nor torch.compile shall look inside.

    Tensors are in the order of `tensor_specs`.
    """
    parsed = Fidelity.parse(fidelity)
    names = tensor_specs(parsed, out_features, hidden_states.shape[-1])
    return _run(hidden_states, dict(zip(names, tensors, strict=True)), parsed, out_features, bias)


@_opaque.register_fake
def _(
    hidden_states: Tensor,
    tensors: list[Tensor],  # noqa: ARG001
    fidelity: str,  # noqa: ARG001
    out_features: int,
    bias: Tensor | None,  # noqa: ARG001
) -> Tensor:
    return hidden_states.new_empty(*hidden_states.shape[:-1], out_features)


@torch.library.custom_op("bitwright::matmul_backward", mutates_args=())
def _opaque_backward(
    gradient: Tensor, tensors: list[Tensor], fidelity: str, in_features: int
) -> Tensor:
    """Return gradient @ W, [..., out] to [..., in]."""
    parsed, out_features = Fidelity.parse(fidelity), gradient.shape[-1]
    named = dict(zip(tensor_specs(parsed, out_features, in_features), tensors, strict=True))
    return gradient @ dequantize_tensors(named, parsed, out_features, in_features, gradient.dtype)


@_opaque_backward.register_fake
def _(gradient: Tensor, tensors: list[Tensor], fidelity: str, in_features: int) -> Tensor:  # noqa: ARG001
    return gradient.new_empty(*gradient.shape[:-1], in_features)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001  as autograd calls it
    hidden_states, tensors, ctx.fidelity, _, bias = inputs
    ctx.in_features, ctx.has_bias = hidden_states.shape[-1], bias is not None
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    tensors, (of_states, *_, of_bias) = ctx.saved_tensors, ctx.needs_input_grad
    states = (
        _opaque_backward(gradient, list(tensors), ctx.fidelity, ctx.in_features)
        if of_states
        else None
    )
    bias = gradient.reshape(-1, gradient.shape[-1]).sum(0) if ctx.has_bias and of_bias else None
    return states, [None] * len(tensors), None, None, bias


_opaque.register_autograd(_gradients, setup_context=_remember)
