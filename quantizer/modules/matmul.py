"""Products with packed weights, by the implementation that `quantizer.kernels.path` chooses."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantizer.kernels.path import CPU, GPU, choose_kernel_path
from quantizer.modules import matmul_cpu, matmul_reference
from quantizer.modules.tensor_cache import TensorCache
from quantizer.packed.dequantize import dequantize_tensors
from quantizer.packed.layout import tensor_specs
from quantizer.plans.fidelity import Fidelity


def prepare(
    tensors: Mapping[str, Tensor], fidelity: Fidelity, in_features: int, cache: TensorCache
) -> None:
    """Fill the cache that the products of a layer share, if their implementation has one."""
    device = next(iter(tensors.values())).device.type
    if device == "cpu" and choose_kernel_path(device).name == CPU:
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

    Differentiable once, in hidden_states and bias. The backward pass dequantizes the weight again;
    only the packed tensors are saved for it.

    Args:
        hidden_states: floats, on the device of the tensors.
        tensors: stored tensors of a layer by name, see `quantizer.packed.weight.QuantizedWeight`;
            other tensors are ignored.
        fidelity: how the layer is stored.
        out_features: rows of the weight.
        bias: [out].
        cache: the layer's, for what its products share.

    Raises:
        KernelError: see `quantizer.kernels.path.choose_kernel_path`.
    """
    differentiable = hidden_states.requires_grad or (bias is not None and bias.requires_grad)
    if torch.compiler.is_compiling() or (differentiable and torch.is_grad_enabled()):
        names = tensor_specs(fidelity, out_features, hidden_states.shape[-1])
        product: Tensor = _matmul_op(
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
        return matmul_cpu.matmul(hidden_states, tensors, fidelity, out_features, bias, cache)
    if name == GPU:
        from quantizer.modules import matmul_gpu  # noqa: PLC0415  Triton may be missing

        return matmul_gpu.matmul(hidden_states, tensors, fidelity, out_features, bias)
    return matmul_reference.matmul(hidden_states, tensors, fidelity, out_features, bias)


@torch.library.custom_op("bitwright::matmul", mutates_args=())
def _matmul_op(
    hidden_states: Tensor,
    tensors: list[Tensor],
    fidelity: str,
    out_features: int,
    bias: Tensor | None,
) -> Tensor:
    """Multiply as one operation, into which neither autograd nor torch.compile looks.

    Tensors are in the order of `tensor_specs`.
    """
    parsed = Fidelity.parse(fidelity)
    names = tensor_specs(parsed, out_features, hidden_states.shape[-1])
    return _run(hidden_states, dict(zip(names, tensors, strict=True)), parsed, out_features, bias)


@_matmul_op.register_fake
def _(
    hidden_states: Tensor,
    tensors: list[Tensor],  # noqa: ARG001
    fidelity: str,  # noqa: ARG001
    out_features: int,
    bias: Tensor | None,  # noqa: ARG001
) -> Tensor:
    return hidden_states.new_empty(*hidden_states.shape[:-1], out_features)


@torch.library.custom_op("bitwright::matmul_backward", mutates_args=())
def _backward_op(
    gradient: Tensor, tensors: list[Tensor], fidelity: str, in_features: int
) -> Tensor:
    """Return gradient @ W, [..., out] to [..., in]."""
    parsed, out_features = Fidelity.parse(fidelity), gradient.shape[-1]
    named = dict(zip(tensor_specs(parsed, out_features, in_features), tensors, strict=True))
    return gradient @ dequantize_tensors(named, parsed, out_features, in_features, gradient.dtype)


@_backward_op.register_fake
def _(gradient: Tensor, tensors: list[Tensor], fidelity: str, in_features: int) -> Tensor:  # noqa: ARG001
    return gradient.new_empty(*gradient.shape[:-1], in_features)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001  as autograd calls it
    hidden_states, tensors, ctx.fidelity, _, bias = inputs
    ctx.in_features = hidden_states.shape[-1]
    ctx.has_bias = bias is not None
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    needs_states, *_, needs_bias = ctx.needs_input_grad
    states = (
        _backward_op(gradient, list(tensors), ctx.fidelity, ctx.in_features)
        if needs_states
        else None
    )
    bias = gradient.reshape(-1, gradient.shape[-1]).sum(0) if ctx.has_bias and needs_bias else None
    return states, [None] * len(tensors), None, None, bias


_matmul_op.register_autograd(_backward, setup_context=_setup_context)
