"""Experts that a model stores as one tensor, taken apart into linear layers.

transformers stores the experts of a layer in three-dimensional parameters, one slice an expert.
Here each expert and projection becomes an `nn.Linear` whose weight is a view of that slice, so that
everything that profiles, quantizes and packs linear layers holds for experts too. The routing is
the model's own and stays as it is.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LEAST_FEATURES = 8
"""Rows or columns; with fewer, scales and zero points take more than quantizing saves."""

_GATED = "gate_up_proj"
_UP = "up_proj"
_DOWN = "down_proj"


@dataclass(frozen=True, slots=True)
class Projection:
    """One projection of all experts, as it stands in a fused parameter.

    Attributes:
        name: its name in an expert; empty if the expert is this one layer.
        parameter: name of the fused parameter, [experts, rows, columns] or [experts * rows,
            columns].
        bias: name of the fused bias, [experts, out]; None if there is none.
        part: which of the output features are its own.
        transposed: whether a slice of the parameter is [in, out] instead of [out, in].
    """

    name: str
    parameter: str
    bias: str | None
    part: slice
    transposed: bool


@dataclass(frozen=True, slots=True)
class FusedExperts:
    """How a module stores its experts.

    Attributes:
        count: number of experts that have weights.
        projections: of each expert.
        separate: the class that computes the same with separate experts.
        activation: the activation function, where it is not the module's `act_fn`.
    """

    count: int
    projections: tuple[Projection, ...]
    separate: "type[SeparateExperts]"
    activation: Any = None


class SeparateExperts(nn.Module):
    """Takes the place of a module with fused experts; expert `e` is the submodule `str(e)`."""

    def __init__(self, original: nn.Module, fused: FusedExperts) -> None:
        """Share all of the original's state but its fused parameters, of which views are taken."""
        super().__init__()
        own = vars(self).keys()
        vars(self).update({key: each for key, each in vars(original).items() if key not in own})
        taken = {name for each in fused.projections for name in (each.parameter, each.bias)}
        for name, child in original.named_children():
            if not any(each and each.startswith(f"{name}.") for each in taken):
                self.add_module(name, child)
        if not hasattr(self, "act_fn"):
            self.act_fn = fused.activation
        for name, parameter in original.named_parameters(recurse=False):
            if name not in taken:
                self.register_parameter(name, parameter)
        for name, buffer in original.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        self.expert_count = fused.count
        self.gate = getattr(type(original), "_apply_gate", _silent_gate)
        for index in range(fused.count):
            self.add_module(str(index), _expert(original, fused, index))
        self.training = original.training

    def expert(self, index: int) -> nn.Module:
        """Return an expert."""
        return self.get_submodule(str(index))

    def run_expert(self, index: int, hidden_states: Tensor) -> Tensor:
        """Return the output of an expert, before its routing weight; [tokens, hidden]."""
        expert: Any = self.expert(index)
        if hasattr(expert, "gate_proj"):
            both = torch.cat([expert.gate_proj(hidden_states), expert.up_proj(hidden_states)], -1)
            inner = self.gate(self, _interleaved(both) if self.interleaved else both)
        else:
            inner = self.activation(expert.up_proj(hidden_states))
        output: Tensor = expert.down_proj(inner)
        norm: Any = getattr(self, "post_expert_norm", None)
        return output if norm is None else norm(output)

    @property
    def activation(self) -> Any:
        """The model's activation function."""
        return self.act_fn

    @property
    def interleaved(self) -> bool:
        """Whether the model's gate takes gate and up features by turns."""
        return not getattr(self, "is_concatenated", True)


class RoutedExperts(SeparateExperts):
    """Experts that get the tokens with the experts and weights that a router chose for each."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs for each token.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: chosen experts, int64 [tokens, chosen]; an index beyond the experts is the
                identity if the model has such, else it is no expert.
            top_k_weights: their weights, [tokens, chosen].
        """
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        chosen = top_k_index.shape[-1]
        order = top_k_index.reshape(-1).argsort(stable=True)
        counts = torch.bincount(top_k_index.reshape(-1), minlength=self.expert_count).tolist()
        dtype = torch.promote_types(flat.dtype, top_k_weights.dtype)
        total = torch.zeros_like(flat, dtype=dtype)
        weights = top_k_weights.reshape(-1)
        for index, places in enumerate(torch.split(order, counts)):
            if not len(places):
                continue
            tokens = places // chosen
            states = flat[tokens]
            if index < self.expert_count:
                output = self.run_expert(index, states)
            elif hasattr(self, "identity_expert"):
                output = states
            else:
                continue
            total = total.index_add(0, tokens, (output * weights[places, None]).to(dtype))
        return total.to(hidden_states.dtype).view_as(hidden_states)


class BatchedExperts(SeparateExperts):
    """Experts that get as many rows each: all tokens, scaled by the router (Llama 4)."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the output of each expert for its rows; [experts * tokens, hidden]."""
        rows = hidden_states.view(self.expert_count, -1, hidden_states.shape[-1])
        outputs = [self.run_expert(index, each) for index, each in enumerate(rows)]
        return torch.cat(outputs)


class ParallelExperts(SeparateExperts):
    """Experts of one projection, which get rows sorted by expert (JetMoE)."""

    def forward(self, inputs: Tensor, expert_size: Sequence[int]) -> Tensor:
        """Return the output of each expert for its rows.

        Args:
            inputs: rows sorted by expert, [rows, in].
            expert_size: number of rows of each expert.
        """
        parts = torch.split(inputs, list(expert_size))
        outputs = [self.expert(index)(part) for index, part in enumerate(parts)]
        return torch.cat(outputs)


def fused_experts(module: nn.Module) -> FusedExperts | None:
    """Return how a module stores its experts; None if it stores none that are known here.

    None also if a projection is too small to be quantized: experts are taken apart whole or not at
    all, so that no part of a fused parameter stays behind.
    """
    fused = _known_experts(module)
    if fused is None:
        return None
    sizes = [_sizes(module, each) for each in fused.projections]
    return fused if min(map(min, sizes)) >= LEAST_FEATURES else None


def _sizes(module: nn.Module, projection: Projection) -> tuple[int, int]:
    """Return output and input features of a projection; of stacked rows, those of all experts."""
    *_, rows, columns = module.get_parameter(projection.parameter).shape
    out_features, in_features = (columns, rows) if projection.transposed else (rows, columns)
    return len(range(out_features)[projection.part]), in_features


def _known_experts(module: nn.Module) -> FusedExperts | None:
    matrices = {
        name: parameter
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3  # noqa: PLR2004  experts, rows, columns
    }
    arguments = list(inspect.signature(type(module).forward).parameters)[1:]
    if set(matrices) == {"weight"} and arguments == ["inputs", "expert_size"]:
        whole = Projection("", "weight", None, slice(None), transposed=False)
        return FusedExperts(len(matrices["weight"]), (whole,), ParallelExperts)
    if _is_stacked(module):
        return _stacked_experts(module)
    first = _GATED if _GATED in matrices else _UP
    if set(matrices) != {first, _DOWN} or len(arguments) not in {1, 3}:
        return None
    batched = len(arguments) == 1
    transposed = bool(getattr(module, "is_transposed", batched))
    biases = dict(module.named_parameters(recurse=False))
    bias, down_bias = (
        f"{name}_bias" if f"{name}_bias" in biases else None for name in (first, _DOWN)
    )
    down = Projection(_DOWN, _DOWN, down_bias, slice(None), transposed)
    inner: tuple[Projection, ...]
    if first == _UP:
        inner = (Projection(_UP, _UP, bias, slice(None), transposed),)
    else:
        features = matrices[_GATED].shape[2 if transposed else 1]
        parts = (
            (slice(0, features // 2), slice(features // 2, None))
            if getattr(module, "is_concatenated", True)
            else (slice(0, None, 2), slice(1, None, 2))
        )
        inner = tuple(
            Projection(name, _GATED, bias, part, transposed)
            for name, part in zip(("gate_proj", _UP), parts, strict=True)
        )
    separate = BatchedExperts if batched else RoutedExperts
    return FusedExperts(len(matrices[_DOWN]), (*inner, down), separate)


def _is_stacked(module: nn.Module) -> bool:
    """Return whether a child holds the rows of all experts below each other (DBRX)."""
    held = {name for name, _ in getattr(module, "mlp", nn.Module()).named_parameters(recurse=False)}
    return held == {"w1", "v1", "w2"} and isinstance(getattr(module, "num_experts", None), int)


def _stacked_experts(module: Any) -> FusedExperts:
    """Return the experts of a module whose child holds their rows below each other."""
    whole = slice(None)
    projections = (
        Projection("gate_proj", "mlp.w1", None, whole, transposed=False),
        Projection(_UP, "mlp.v1", None, whole, transposed=False),
        Projection(_DOWN, "mlp.w2", None, whole, transposed=True),
    )
    return FusedExperts(module.num_experts, projections, RoutedExperts, module.mlp.activation_fn)


def _expert(original: nn.Module, fused: FusedExperts, index: int) -> nn.Module:
    """Return an expert: a module with its projections, or its only layer."""
    layers = {each.name: _linear(original, each, fused.count, index) for each in fused.projections}
    if "" in layers:
        return layers[""]
    expert = nn.Module()
    for name, layer in layers.items():
        expert.add_module(name, layer)
    return expert


def _linear(original: nn.Module, projection: Projection, count: int, index: int) -> nn.Linear:
    """Return a projection of an expert; its weight and bias are views of the fused ones."""
    parameter = original.get_parameter(projection.parameter).detach()
    if parameter.dim() == 2:  # noqa: PLR2004  rows of all experts, columns
        parameter = parameter.view(count, -1, parameter.shape[-1])
    weight = parameter[index]
    weight = (weight.t() if projection.transposed else weight)[projection.part]
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if projection.bias is not None:
        bias = original.get_parameter(projection.bias)[index].detach()[projection.part]
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def _interleaved(both: Tensor) -> Tensor:
    """Return gate and up features by turns, from gate features followed by up features."""
    return torch.stack(both.chunk(2, dim=-1), dim=-1).flatten(-2)


def _silent_gate(experts: Any, gate_up: Tensor) -> Tensor:
    """Return what experts without a gate function of their own compute: act(gate) * up."""
    gate, up = gate_up.chunk(2, dim=-1)
    activated: Tensor = experts.act_fn(gate)
    return activated * up
