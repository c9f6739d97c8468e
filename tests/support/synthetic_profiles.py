"""Made-up profiles: exact layer sizes, random effects that look like measured ones, from a seed."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import settings
from numpy.typing import NDArray

from allocator.profile import Profile
from quantizer.plans.fidelity import Fidelity
from quantizer.plans.plan import LayerSpec

GROUP = 64
RATIOS = (0.0625, 0.125, 0.1875, 0.25, 0.375, 0.5)
"""Shares of high-impact columns of made-up menus."""

SHAPES = ((512, 512), (768, 512), (512, 1024), (384, 768))
"""Rows and columns of made-up layers; every fidelity of a menu has another size on each of them."""

PROPERTY = settings(deadline=None, max_examples=25, derandomize=True, database=None)
"""How properties are tested: on the same examples at each run, however slow the machine."""


def make_layers(count: int, seed: int = 0) -> tuple[LayerSpec, ...]:
    """Return layers of mixed shapes, two to a block."""
    rng = np.random.default_rng(seed)
    shapes = [SHAPES[int(index)] for index in rng.integers(len(SHAPES), size=count)]
    return tuple(
        LayerSpec(f"blocks.{at // 2}.linear{at % 2}", at // 2, f"linear{at % 2}", *shape)
        for at, shape in enumerate(shapes)
    )


def make_fidelities(menu: int) -> tuple[Fidelity, ...]:
    """Return `menu` fidelities of rising size: 3 bits alone, or 2 to 4 bits with splits between."""
    if menu == 1:
        return (Fidelity.uniform(3, GROUP),)
    splits = (
        tuple(Fidelity(2, 4, ratio, GROUP) for ratio in RATIOS[-(menu - 2) :]) if menu > 2 else ()
    )
    return (Fidelity.uniform(2, GROUP), *splits, Fidelity.uniform(4, GROUP))


def make_profile(
    seed: int,
    *,
    layers: int = 5,
    menu: int = 4,
    rank: int = 3,
    coupling: float = 0.1,
    spread: float = 1.0,
    duplicated: bool = False,
    silent: int = 0,
    rising: bool = False,
    signal: str = "output",
    in_original: bool = False,
) -> Profile:
    """Return a profile of a made-up model.

    Its larger fidelities do less damage, as measured ones do.

    Args:
        seed: of everything random.
        layers: how many.
        menu: how many fidelities, 1 to 8.
        rank: directions in which layers couple; with 0, damages just add up.
        coupling: second-order share of a single damage; the larger, the more depends on which
            layers change together.
        spread: orders of magnitude between the effects of the least and the most sensitive layer.
        duplicated: every layer is the same as the first, in shape and effects.
        silent: so many layers at the end have no effect at all.
        rising: effects have random signs, so that larger fidelities may do more damage than smaller
            ones.
        signal: how the effects are said to have been measured.
        in_original: the context is the original model, in which every change does damage.
    """
    rng = np.random.default_rng(seed)
    specs, fidelities, context = (
        make_layers(layers, seed),
        make_fidelities(menu),
        None if in_original else menu // 2,
    )
    scale = 10 ** np.linspace(0, -spread, layers)[rng.permutation(layers), None] * rng.uniform(
        0.5, 2, (layers, 1)
    )
    steps = rng.uniform(0.2, 1, (layers, menu)) * np.geomspace(1, 0.2, menu)
    damage = np.flip(np.flip(steps, 1).cumsum(1), 1) * scale
    if context is not None:
        damage -= damage[:, [context]]
    if rising:
        damage *= rng.choice((-1, 1), damage.shape)
    sides = rng.normal(size=(rank, layers, 2)) / max(rank, 1) ** 0.5
    smaller = np.arange(menu) < (menu if context is None else context)
    direction = np.where(smaller, sides[:, :, :1], sides[:, :, 1:])
    factor = direction * np.sqrt(2 * coupling * np.abs(damage))
    linear = damage - np.square(factor).sum(0) / 2
    if duplicated:
        specs = tuple(
            replace(layer, out_features=SHAPES[0][0], in_features=SHAPES[0][1]) for layer in specs
        )
        linear, factor = np.repeat(linear[:1], layers, 0), np.repeat(factor[:, :1], layers, 1)
    if silent:
        linear[-silent:], factor[:, -silent:] = 0, 0
    flat = np.ascontiguousarray(factor.reshape(rank, layers * menu))
    context_loss = 0.0 if in_original else 2.0
    return Profile(
        signal,
        specs,
        fidelities,
        context,
        context_loss,
        linear,
        flat,
        0.0,
        4096,
        "a" * 64,
        "b" * 64,
    )


def permuted(profile: Profile, order: Sequence[int]) -> Profile:
    """Return the profile with its layers in another order."""
    factor = profile.factor.reshape(-1, *profile.linear.shape)[:, list(order)]
    return replace(
        profile,
        layers=tuple(profile.layers[at] for at in order),
        linear=profile.linear[list(order)],
        factor=np.ascontiguousarray(factor.reshape(profile.factor.shape)),
    )


def byte_ends(profile: Profile) -> tuple[int, int]:
    """Return the bytes of the smallest and of the largest plan, added up in plain Python."""
    sizes = [
        [
            fidelity.weight_bytes(layer.out_features, layer.in_features)
            for fidelity in profile.fidelities
        ]
        for layer in profile.layers
    ]
    return sum(min(row) for row in sizes), sum(max(row) for row in sizes)


def budget_at(profile: Profile, share: float) -> int:
    """Return the budget at a share of the way from the smallest to the largest plan."""
    low, high = byte_ends(profile)
    return low + round(share * (high - low))


def decoder_layers(kinds: Sequence[str], blocks: int) -> tuple[LayerSpec, ...]:
    """Return layers called as those of a decoder are: `model.layers.0.self_attn.q_proj`, all kinds in each block."""
    return tuple(
        LayerSpec(f"model.layers.{block}.{kind}", block, kind, *SHAPES[(block + at) % len(SHAPES)])
        for block in range(blocks)
        for at, kind in enumerate(kinds)
    )


def make_decoder_profile(seed: int, kinds: Sequence[str], blocks: int, **options: Any) -> Profile:
    """Return a made-up profile, see `make_profile`, of layers that are called as those of a decoder are."""
    layers = decoder_layers(kinds, blocks)
    return replace(make_profile(seed, layers=len(layers), **options), layers=layers)


def every_plan(
    profile: Profile,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Return (menu indices [N, L], bytes [N], losses [N]) of all plans of a small profile, as its docstring defines the loss."""
    layers, menu = profile.linear.shape
    choices = np.indices((menu,) * layers).reshape(layers, -1).T
    rows = np.arange(layers)
    effect = profile.factor.reshape(-1, layers, menu)[:, rows, choices].sum(axis=2)
    losses = (
        profile.context_loss
        + profile.linear[rows, choices].sum(axis=1)
        + np.square(effect).sum(axis=0) / 2
    )
    sizes = [
        [
            option.weight_bytes(layer.out_features, layer.in_features)
            for option in profile.fidelities
        ]
        for layer in profile.layers
    ]
    return choices, np.array(sizes)[rows, choices].sum(axis=1), losses
