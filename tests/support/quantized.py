"""Inputs of tests: fidelities, token windows, random weights and plans."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from quantizer.models.folder import ModelFolder
from quantizer.packed.adapter import Adapter
from quantizer.packed.layout import named_parts
from quantizer.packed.outliers import compress_rows
from quantizer.packed.scales import scale_unit
from quantizer.packed.weight import PartCodes, QuantizedWeight
from quantizer.plans.fidelity import (
    ADAPTER_RANK_LIMIT,
    CODE_BITS,
    COLUMN_MULTIPLE,
    SCALE_BITS,
    Fidelity,
)
from quantizer.plans.plan import Plan
from quantizer.structure.blocks import find_layers
from tests.support.tiny_models import VOCABULARY


@dataclass(frozen=True)
class Packed:
    """A packed model that was saved.

    Attributes:
        folder: the checkpoint.
        source: the original.
        plan: fidelities of its layers.
        weights: quantized layers by name.
        logits: of the packed model in memory, in float32, before it was saved.
    """

    folder: Path
    source: ModelFolder
    plan: Plan
    weights: dict[str, QuantizedWeight]
    logits: Tensor


TinyFolder = Callable[[str], ModelFolder]
TinyModel = Callable[[str], Any]
Edited = Callable[..., Path]
PackedModel = Callable[[str], Packed]

PACKED_TOKENS = torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))
MENU = (
    Fidelity.uniform(3, 32),
    Fidelity(2, 4, 0.4, 32),
    Fidelity.uniform(8, 64),
    Fidelity.uniform(2, 32),
)

OPTION_NAMES = (
    "int2g32s8",
    "int3g64s6",
    "int2g32o0.01",
    "int2g32a4",
    "int2+4r0.4g32s8o0.005a16",
    "int3+8r0.3g64s6o0.02a256",
)
"""Fidelities with each option, and with all of them."""

fixed = settings(derandomize=True, deadline=None, max_examples=100)
"""Hypothesis settings with the same examples at each run."""

few = settings(fixed, max_examples=25)

group_sizes = st.integers(1, 8).map(lambda steps: steps * COLUMN_MULTIPLE)


def fidelities(
    smallest_ratio: float = 0.0001, largest_ratio: float = 0.999999
) -> st.SearchStrategy[Fidelity]:
    """Return a strategy for uniform and split fidelities, with and without options."""
    widths = st.sampled_from([(low, high) for low in CODE_BITS for high in CODE_BITS if low < high])
    ratios = st.integers(round(smallest_ratio * 1e6), round(largest_ratio * 1e6)).map(
        lambda millionths: millionths / 1e6
    )
    split = st.builds(
        lambda pair, ratio, size: Fidelity(*pair, ratio, size), widths, ratios, group_sizes
    )
    plain = split | st.builds(Fidelity.uniform, st.sampled_from(CODE_BITS), group_sizes)
    shares = st.just(0.0) | st.integers(1, 99_999).map(lambda millionths: millionths / 1e6)
    ranks = st.just(0) | st.integers(1, ADAPTER_RANK_LIMIT)
    return st.builds(
        lambda fidelity, bits, share, rank: replace(
            fidelity, scale_bits=bits, outlier_share=share, adapter_rank=rank
        ),
        *(plain, st.sampled_from(SCALE_BITS), shares, ranks),
    )


def token_windows(windows: int, tokens: int, seed: int = 0) -> Tensor:
    """Return random token ids, int64 [windows, tokens]."""
    return torch.randint(
        VOCABULARY, (windows, tokens), generator=torch.Generator().manual_seed(seed)
    )


def correlated_inputs(tokens: int, features: int, seed: int = 0) -> Tensor:
    """Return inputs whose columns are strongly correlated and of very different sizes.

    Returns:
        float32 [tokens, features].
    """
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator) * torch.logspace(
        0, -2, features
    ).unsqueeze(1)
    return torch.randn(tokens, features, generator=generator) @ mixing


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Return standard normal numbers, float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_weight(
    fidelity: Fidelity, out_features: int, in_features: int, seed: int = 0
) -> QuantizedWeight:
    """Return a layer of random codes, scales, zero points, column order, outliers and adapter.

    An adapter's entries are sixteenths of at most a half: sums of their products are exact in
    float32 in any order.
    """
    generator = torch.Generator().manual_seed(seed)
    plain = replace(fidelity, adapter_rank=0)
    row_scale = None
    if fidelity.scale_bits < 16:
        row_scale = torch.rand(out_features, generator=generator).add(0.1).div(50).half().float()
    parts = []
    for _, columns, bits in named_parts(fidelity, in_features):
        groups = -(-columns // fidelity.group_size)
        codes = torch.randint(2**bits, (out_features, columns), generator=generator).float()
        if row_scale is None:
            scale = torch.rand(groups, out_features, generator=generator).add(0.01).half().float()
        else:
            counts = torch.randint(
                1, 2**fidelity.scale_bits, (groups, out_features), generator=generator
            )
            scale = scale_unit(row_scale, fidelity, bits) * counts
        zero = torch.randint(2**bits, (groups, out_features), generator=generator).float()
        parts.append(PartCodes(codes, scale, zero))
    order = torch.randperm(in_features, generator=generator)
    outliers = None
    if count := fidelity.outlier_count(out_features, in_features):
        chosen = torch.zeros(out_features * in_features, dtype=torch.bool)
        chosen[torch.randperm(chosen.numel(), generator=generator)[:count]] = True
        values = torch.randn(out_features, in_features, generator=generator)
        outliers = compress_rows(values, chosen.view(out_features, in_features))
    weight = QuantizedWeight.from_codes(plain, order, tuple(parts), row_scale, outliers)
    if not fidelity.adapter_rank:
        return weight
    rank = fidelity.stored_adapter_rank(out_features, in_features)
    a = torch.randint(-8, 9, (rank, in_features), generator=generator).half() / 16
    b = torch.randint(-8, 9, (out_features, rank), generator=generator).half() / 16
    return weight.with_adapter(fidelity.adapter_rank, Adapter(a, b))


def stored_bytes(weight: QuantizedWeight) -> int:
    """Return the bytes of all tensors, counted as a file would hold them."""
    return sum(
        len(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        for tensor in weight.tensors.values()
    )


@torch.no_grad()
def logits_of(model: Any, tokens: Tensor) -> Tensor:
    """Return a model's logits [batch, tokens, vocabulary]."""
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


def mixed_plan(model: Any) -> tuple[Plan, dict[str, QuantizedWeight]]:
    """Return a plan of mixed fidelities, and random quantized layers with small scales."""
    layers = find_layers(model)
    plan = Plan(layers, tuple(MENU[index % len(MENU)] for index in range(len(layers))))
    weights = {}
    for seed, (layer, fidelity) in enumerate(zip(plan.layers, plan.fidelities, strict=True)):
        weight = random_weight(fidelity, layer.out_features, layer.in_features, seed)
        small = {
            name: tensor * 0.02 if name.endswith("_scales") else tensor
            for name, tensor in weight.tensors.items()
        }
        weights[layer.name] = QuantizedWeight(
            fidelity, layer.out_features, layer.in_features, small
        )
    return plan, weights
