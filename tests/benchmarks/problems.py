"""Made-up profiles the size of large models, with the statistics of measured ones.

Errors fall four times for each bit, with 5 % between layers; sensitivities of layers spread
log-normally, one natural unit wide. A quarter of each end's squared effect lies along directions
that layers share, whose strength falls with the square root of their rank; the two ends of a
layer's menu point against each other with a correlation of 0.6. Compare tests/profiles.
"""

import numpy as np

from allocator.profile import Profile
from quantizer.plans.fidelity import Fidelity
from quantizer.plans.plan import LayerSpec

MENU = (
    *(
        "int2+3r0.125g256",
        "int2+4r0.0625g256",
        "int2+3r0.25g256",
        "int2+3r0.375g128",
        "int2+3r0.5g128",
        "int2+3r0.75g128",
    ),
    *(
        "int3g128",
        "int3+4r0.125g256",
        "int3+4r0.25g128",
        "int3+4r0.5g128",
        "int4g128",
        "int4+8r0.125g128",
    ),
)
CONTEXT = 3
SHARED = 0.25
OPPOSED = 0.6


def llama_70b(rank: int = 256, seed: int = 0) -> Profile:
    """Return a profile of 80 blocks of seven layers with the shapes of a 70B model."""
    hidden, inner, narrow = 8192, 28672, 1024
    kinds = (
        ("self_attn.q_proj", hidden, hidden),
        ("self_attn.k_proj", narrow, hidden),
        ("self_attn.v_proj", narrow, hidden),
        ("self_attn.o_proj", hidden, hidden),
        ("mlp.gate_proj", inner, hidden),
        ("mlp.up_proj", inner, hidden),
        ("mlp.down_proj", hidden, inner),
    )
    layers = [
        LayerSpec(f"model.layers.{block}.{kind}", block, kind, rows, columns)
        for block in range(80)
        for kind, rows, columns in kinds
    ]
    return made_up(layers, rank, seed)


def mixture_of_experts(rank: int = 64, seed: int = 0) -> Profile:
    """Return a profile of 48 blocks of 128 experts of three layers."""
    kinds = (("gate_proj", 768, 2048), ("up_proj", 768, 2048), ("down_proj", 2048, 768))
    layers = [
        LayerSpec(
            f"model.layers.{block}.mlp.experts.{expert}.{kind}",
            block,
            f"mlp.experts.{expert}.{kind}",
            rows,
            columns,
        )
        for block in range(48)
        for expert in range(128)
        for kind, rows, columns in kinds
    ]
    return made_up(layers, rank, seed)


def made_up(layers: list[LayerSpec], rank: int, seed: int) -> Profile:
    """Return a profile of these layers with the statistics that the module names."""
    rng, fidelities = np.random.default_rng(seed), tuple(map(Fidelity.parse, MENU))
    count, menu = len(layers), len(fidelities)
    bits = np.array([8 * fidelity.weight_bytes(4096, 4096) / 4096**2 for fidelity in fidelities])
    error = 4.0**-bits * np.exp(rng.normal(0, 0.05, (count, menu)))
    error = np.sort(error)[:, ::-1]
    error /= error[:, [CONTEXT]]
    share = np.exp(rng.normal(0, 1, count)) * np.array([layer.weights for layer in layers]) ** 0.5
    damage = 0.8 * (share / share.sum())[:, None] * (error - 1)
    base = rng.normal(size=(rank, count, 2)) / np.sqrt(np.arange(1, rank + 1))[:, None, None]
    base /= np.sqrt(np.square(base).sum(axis=0))
    base[:, :, 1] = -OPPOSED * base[:, :, 0] + (1 - OPPOSED**2) ** 0.5 * base[:, :, 1]
    base *= np.sqrt(2 * SHARED * np.abs(damage[:, [0, -1]]))
    low = ((error - 1) / (error[:, [0]] - 1)).clip(0, 1)
    high = ((error - 1) / (error[:, [-1]] - 1)).clip(0, 1)
    factor = np.einsum("rle,lke->rlk", base, np.stack([low, high], axis=2))
    linear = damage - np.square(factor).sum(axis=0) / 2
    flat = factor.reshape(rank, -1)
    return Profile(
        "output",
        tuple(layers),
        fidelities,
        CONTEXT,
        1.0,
        linear,
        flat,
        0.25,
        8192,
        "0" * 64,
        "0" * 64,
    )
