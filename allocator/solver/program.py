"""The allocation program in numbers.

What may be chosen for each group of layers, what it does, and what it takes.

    minimise    loss(x) = constant + linear . x + 1/2 |y|^2
    where       u[g] = spans[g]' x[g]                     a group's effect, in the few directions that it can move in
                y = sum_g base[:, g] u[g]                 the joint effect
    subject to  sum_k x[g, k] = 1,  x in {0, 1}           one fidelity for each group; relaxed, shares of them
                x = 0 where not allowed
                sizes . x <= budget,  cost . x <= most    for every further limit

A group is a layer, or several that must agree: their effects and costs add up. As x is 0 or 1 on
every group, all of a group's own effect may stand in `linear`; what stands in `base` makes the
relaxation weaker the more it belongs to one group alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from allocator.profile import Array, Profile

Choice = NDArray[np.int64]
Bytes = NDArray[np.int64]

_SAME_DIRECTION = 1e-12
"""Directions of a group's effect below this share of its largest one are rounding errors."""


@dataclass(frozen=True, slots=True)
class Limit:
    """Something else that a plan may use only so much of: bytes on one device, or microseconds.

    Attributes:
        name: what it is called in answers.
        unit: of the cost.
        cost: float64 [G, K], not negative.
        most: the limit.
    """

    name: str
    unit: str
    cost: Array
    most: float


@dataclass(frozen=True, slots=True)
class Program:
    """The program of one profile under one set of constraints; only the budget is left open.

    Attributes:
        members: indices of the layers of each of G groups.
        constant: loss of the context, [nats/token].
        linear: float64 [G, K], [nats/token].
        base: float64 [rank, G, D], [sqrt(nats/token)]; D directions at most in which a group's
            effect can move.
        spans: float64 [G, K, D], where fidelity k stands along them.
        sizes: int64 [G, K], bytes.
        allowed: bool [G, K], at least one in each row.
        limits: further limits.
    """

    members: tuple[tuple[int, ...], ...]
    constant: float
    linear: Array
    base: Array
    spans: Array
    sizes: Bytes
    allowed: NDArray[np.bool_]
    limits: tuple[Limit, ...] = ()

    @classmethod
    def of(cls, profile: Profile, groups: Sequence[Sequence[int]] | None = None) -> "Program":
        """Return the program of a profile in which everything is allowed.

        Args:
            profile: effects and sizes.
            groups: indices of layers that must agree, each layer in one group; None lets each layer
                choose alone.
        """
        layers, menu = profile.linear.shape
        members = (
            tuple((at,) for at in range(layers))
            if groups is None
            else tuple(tuple(group) for group in groups)
        )
        effect = np.ascontiguousarray(profile.factor.reshape(-1, layers, menu))
        sizes, linear = profile.weight_bytes, profile.linear
        if groups is not None:
            order = [at for group in members for at in group]
            starts = np.cumsum([0, *(len(group) for group in members[:-1])])
            linear, sizes = (
                np.add.reduceat(values[order], starts, axis=0) for values in (linear, sizes)
            )
            effect = np.add.reduceat(effect[:, order], starts, axis=1)
        base, spans = _directions(effect)
        allowed = np.ones(linear.shape, dtype=np.bool_)
        return cls(members, profile.context_loss, linear, base, spans, sizes, allowed)

    @property
    def groups(self) -> int:
        """Number of groups, G."""
        return len(self.members)

    @property
    def rank(self) -> int:
        """Number of directions in which groups couple; 0 where damages just add up."""
        return int(self.base.shape[0])

    @property
    def flat_base(self) -> Array:
        """The base with all directions of all groups in one row, [rank, G * D]."""
        return self.base.reshape(self.rank, self.groups * self.base.shape[2])

    def among(self, allowed: NDArray[np.bool_]) -> "Program":
        """Return the program in which only what `allowed` [G, K] says may be chosen, of what could be before."""
        return replace(self, allowed=self.allowed & allowed)

    def loss(self, choice: Choice) -> float:
        """Return the loss of the choice of each group, int64 [G]."""
        rows = np.arange(self.groups)
        effect = np.einsum("rgd,gd->r", self.base, self.spans[rows, choice])
        return float(self.constant + self.linear[rows, choice].sum() + effect @ effect / 2)

    def loss_of_shares(self, share: Array) -> float:
        """Return the loss of a mix [G, K] whose rows sum to 1."""
        effect = self.effect(share)
        return float(self.constant + (self.linear * share).sum() + effect @ effect / 2)

    def effect(self, share: Array) -> Array:
        """Return the joint effect y [rank] of a mix."""
        inner = np.einsum("gkd,gk->gd", self.spans, share)
        return np.asarray(self.flat_base @ inner.ravel(), dtype=np.float64)

    def gradient(self, effect: Array) -> Array:
        """Return the derivative of the loss by the shares, [G, K], where the joint effect is `effect` [rank]."""
        pull = (effect @ self.flat_base).reshape(self.groups, self.base.shape[2])
        return np.asarray(self.linear + np.einsum("gkd,gd->gk", self.spans, pull), dtype=np.float64)

    def used_bytes(self, choice: Choice) -> int:
        """Return the exact bytes of a choice."""
        return int(self.sizes[np.arange(self.groups), choice].sum())

    def byte_range(self) -> tuple[int, int]:
        """Return the bytes of the smallest and of the largest choice that is allowed, whatever the further limits."""
        largest = np.where(self.allowed, self.sizes, -1).max(axis=1)
        return int(self.smallest_sizes().sum()), int(largest.sum())

    def smallest_sizes(self) -> Bytes:
        """Return the bytes of the smallest fidelity that each group may have, int64 [G]."""
        return np.asarray(
            np.where(self.allowed, self.sizes, np.iinfo(np.int64).max).min(axis=1), dtype=np.int64
        )

    def scale(self) -> float:
        """Return the largest loss that a group alone can change, to measure what is negligible by."""
        own = (
            np.square(np.einsum("rgd,gkd->rgk", self.base, self.spans)).sum(axis=0)
            if self.rank
            else 0.0
        )
        return float(np.abs(self.linear + own / 2).max()) or 1.0

    def per_layer(self, choice: Choice) -> Choice:
        """Return the choice of each layer, int64 [L], from that of each group."""
        layers = np.concatenate([np.array(group) for group in self.members])
        found = np.empty(len(layers), dtype=np.int64)
        found[layers] = np.repeat(choice, [len(group) for group in self.members])
        return found


def _directions(effect: Array) -> tuple[Array, Array]:
    """Return (base [rank, G, D], spans [G, K, D]) with base . spans = effect [rank, G, K], and D as small as it can be."""
    _, groups, menu = effect.shape
    if not effect.any():
        return np.zeros((0, groups, 0)), np.zeros((groups, menu, 0))
    left, size, right = np.linalg.svd(effect.transpose(1, 0, 2), full_matrices=False)
    used = int((size > _SAME_DIRECTION * size.max()).any(axis=0).sum())
    base = (left * size[:, None])[:, :, :used].transpose(1, 0, 2)
    return np.ascontiguousarray(base), np.ascontiguousarray(right[:, :used].transpose(0, 2, 1))
