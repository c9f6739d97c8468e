"""Synthetic profiles from a seed: exact layer sizes, and random effects like measured ones."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import settings
from numpy.typing import NDArray

from allocator.profile import Profile
from quantizer.plans.fidelity import Fidelity
from quantizer.plans.plan import LayerSpec

GROUP = 64
RATIOS = (0.0625, 0.125, 0.1875, 0.25, 0.375, 0.5)
"""Shares of high-impact columns in the fidelities of synthetic menus."""

SHAPES = ((512, 512), (768, 512), (512, 1024), (384, 768))
"""Rows and columns of synthetic layers; on each, all fidelities of a menu differ in size."""

PROPERTY = settings(deadline=None, max_examples=25, derandomize=True, database=None)
"""Settings of property tests: the same examples in each run, and no deadline."""


def make_layers(count: int, seed: int = 0) -> tuple[LayerSpec, ...]:
    """Return layers of mixed shapes, two in each block."""
    rng = np.random.default_rng(seed)
    shapes = [SHAPES[int(index)] for index in rng.integers(len(SHAPES), size=count)]
    return tuple(
        LayerSpec(f"blocks.{at // 2}.linear{at % 2}", at // 2, f"linear{at % 2}", *shape)
        for at, shape in enumerate(shapes)
    )


def make_fidelities(menu: int) -> tuple[Fidelity, ...]:
    """Return `menu` fidelities of rising size: 3 bits only, or 2 to 4 bits with mixes between."""
    if menu == 1:
        return (Fidelity.uniform(3, GROUP),)
    ratios = RATIOS[-(menu - 2) :] if menu > 2 else ()
    mixes = tuple(Fidelity(2, 4, ratio, GROUP) for ratio in ratios)
    return (Fidelity.uniform(2, GROUP), *mixes, Fidelity.uniform(4, GROUP))


@dataclass(frozen=True)
class ProfileOptions:
    """What a synthetic profile looks like.

    Attributes:
        layers: number of layers.
        menu: number of fidelities, 1 to 8.
        rank: number of directions in which layers couple; if 0, damages add up.
        coupling: second-order share of a single damage. The larger it is, the more depends on which
            layers change together.
        spread: orders of magnitude between the effects of the least and the most sensitive layer.
        duplicated: whether every layer equals the first, in shape and effects.
        silent: number of layers at the end that have no effect at all.
        rising: whether effects have random signs, so that larger fidelities may cause more damage.
        signal: name of the signal that the profile states.
        in_original: whether the context is the original model, so that every change causes damage.
    """

    layers: int = 5
    menu: int = 4
    rank: int = 3
    coupling: float = 0.1
    spread: float = 1.0
    duplicated: bool = False
    silent: int = 0
    rising: bool = False
    signal: str = "output"
    in_original: bool = False

    @property
    def context(self) -> int | None:
        """Index of the context's fidelity in the menu, None for the original model."""
        return None if self.in_original else self.menu // 2


def make_profile(seed: int, **changes: Any) -> Profile:
    """Return a synthetic profile; larger fidelities cause less damage, as in measured profiles.

    Args:
        seed: seed of all random numbers.
        changes: fields of `ProfileOptions` that differ from their defaults.
    """
    options = ProfileOptions(**changes)
    rng = np.random.default_rng(seed)
    layers = make_layers(options.layers, seed)
    damage = _damage(rng, options)
    factor = _factor(rng, options, damage)
    linear = damage - np.square(factor).sum(0) / 2
    if options.duplicated:
        rows, columns = SHAPES[0]
        layers = tuple(replace(each, out_features=rows, in_features=columns) for each in layers)
        linear = np.repeat(linear[:1], options.layers, 0)
        factor = np.repeat(factor[:, :1], options.layers, 1)
    if options.silent:
        linear[-options.silent :] = 0
        factor[:, -options.silent :] = 0
    return Profile(
        signal=options.signal,
        layers=layers,
        fidelities=make_fidelities(options.menu),
        context=options.context,
        context_loss=0.0 if options.in_original else 2.0,
        linear=linear,
        factor=np.ascontiguousarray(factor.reshape(options.rank, linear.size)),
        truncation=0.0,
        tokens=4096,
        model_sha256="a" * 64,
        calibration_sha256="b" * 64,
    )


def _damage(rng: np.random.Generator, options: ProfileOptions) -> NDArray[np.float64]:
    """Return the damage of single changes, [layers, menu]."""
    layers = options.layers
    shape = (layers, options.menu)
    sensitivity = 10 ** np.linspace(0, -options.spread, layers)[rng.permutation(layers), None]
    scale = sensitivity * rng.uniform(0.5, 2, (layers, 1))
    steps = rng.uniform(0.2, 1, shape) * np.geomspace(1, 0.2, options.menu)
    damage = np.flip(np.flip(steps, 1).cumsum(1), 1) * scale
    if options.context is not None:
        damage -= damage[:, [options.context]]
    if options.rising:
        damage *= rng.choice((-1, 1), shape)
    return np.asarray(damage, dtype=np.float64)


def _factor(
    rng: np.random.Generator, options: ProfileOptions, damage: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the coupling factor [rank, layers, menu].

    Fidelities below and above the context have different directions.
    """
    sides = rng.normal(size=(options.rank, options.layers, 2)) / max(options.rank, 1) ** 0.5
    context = options.menu if options.context is None else options.context
    smaller = np.arange(options.menu) < context
    direction = np.where(smaller, sides[:, :, :1], sides[:, :, 1:])
    return np.asarray(direction * np.sqrt(2 * options.coupling * np.abs(damage)), dtype=np.float64)


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
    """Return layers with the names of a decoder's, such as `model.layers.0.self_attn.q_proj`.

    Every block has one layer of each kind.
    """
    return tuple(
        LayerSpec(f"model.layers.{block}.{kind}", block, kind, *SHAPES[(block + at) % len(SHAPES)])
        for block in range(blocks)
        for at, kind in enumerate(kinds)
    )


def make_decoder_profile(seed: int, kinds: Sequence[str], blocks: int, **options: Any) -> Profile:
    """Return a synthetic profile, see `make_profile`, of layers with the names of a decoder's."""
    layers = decoder_layers(kinds, blocks)
    return replace(make_profile(seed, layers=len(layers), **options), layers=layers)


def every_plan(
    profile: Profile,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Return (menu indices [N, L], bytes [N], losses [N]) of all plans of a small profile.

    The loss is computed by its definition in `allocator.profile`.
    """
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
