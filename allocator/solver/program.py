"""The allocation problem in numbers: a quadratic integer program (a multiple-choice knapsack).

G groups of layers each choose one of K fidelities. With x[g, k] = 1 where group g has fidelity k,

    minimise    loss(x) = constant + linear . x + 1/2 |y|^2    [nats/token]
    where       u[g] = coordinates[g]' x[g]                    effect of one group, in D directions
                y = sum_g basis[:, g] u[g]                     joint effect of all groups
    subject to  sum_k x[g, k] = 1,  x in {0, 1}                one fidelity for each group
                x = 0 where not allowed
                sizes . x <= budget,  cost . x <= most         budget, and every further limit

The relaxation replaces x in {0, 1} by x >= 0, so that a group may have shares of several
fidelities. A group is one layer, or several that must share a fidelity: their effects and costs add
up. As x is 0 or 1, all of a group's effect on itself may stand in `linear`; what stands in `basis`
instead weakens the relaxation the more, the more of it belongs to one group alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allocator.demands.constraints import ROUNDING
from allocator.profile import Array, Profile, layer_sizes
from quantizer.plans.fidelity import Fidelity
from quantizer.plans.plan import LayerSpec

Choice = NDArray[np.int64]
Bytes = NDArray[np.int64]

_SAME_DIRECTION = 1e-12
"""Singular values below this share of the largest one are rounding errors."""


@dataclass(frozen=True, slots=True)
class Limit:
    """A further linear constraint: bytes on one device, or microseconds.

    Attributes:
        name: what it is called in answers.
        unit: of the cost.
        cost: float64 [G, K], not negative.
        most: largest total cost of a plan.
    """

    name: str
    unit: str
    cost: Array
    most: float

    @property
    def ceiling(self) -> float:
        """The limit with room for rounding errors of the sum."""
        return self.most * (1 + ROUNDING)

    def used(self, choice: Choice) -> float:
        """Return the total cost of a choice, int64 [G]."""
        return float(self.cost[np.arange(len(choice)), choice].sum())


@dataclass(frozen=True, slots=True)
class Program:
    """The program of one profile under one set of constraints; only the budget is left open.

    Attributes:
        members: indices of the layers of each of G groups.
        constant: loss of the context, [nats/token].
        linear: float64 [G, K], [nats/token].
        basis: float64 [rank, G, D], [sqrt(nats/token)]; the at most D directions in which the
            effect of each group can move.
        coordinates: float64 [G, K, D], the effect of each fidelity along these directions.
        sizes: int64 [G, K], bytes.
        allowed: bool [G, K], at least one in each row.
        limits: further limits.
    """

    members: tuple[tuple[int, ...], ...]
    constant: float
    linear: Array
    basis: Array
    coordinates: Array
    sizes: Bytes
    allowed: NDArray[np.bool_]
    limits: tuple[Limit, ...] = ()

    @classmethod
    def of(cls, profile: Profile, groups: Sequence[Sequence[int]] | None = None) -> "Program":
        """Return the program of a profile in which everything is allowed.

        Args:
            profile: effects and sizes.
            groups: indices of layers that share a fidelity, each layer in one group; None lets each
                layer choose by itself.
        """
        layers, menu = profile.linear.shape
        effect = np.ascontiguousarray(profile.factor.reshape(-1, layers, menu))
        linear = profile.linear
        sizes = profile.weight_bytes
        members = _members(groups, layers)
        if groups is not None:
            linear = _summed(linear, members, axis=0)
            sizes = _summed(sizes, members, axis=0)
            effect = _summed(effect, members, axis=1)
        basis, coordinates = _factored(effect)
        allowed = np.ones(linear.shape, dtype=np.bool_)
        return cls(members, profile.context_loss, linear, basis, coordinates, sizes, allowed)

    @classmethod
    def of_sizes(
        cls,
        layers: Sequence[LayerSpec],
        fidelities: Sequence[Fidelity],
        groups: Sequence[Sequence[int]],
    ) -> "Program":
        """Return a program whose loss is zero, to ask which sizes are feasible before profiling.

        Args:
            layers: all layers.
            fidelities: the menu.
            groups: as for `of`.
        """
        members = _members(groups, len(layers))
        sizes = _summed(layer_sizes(layers, fidelities), members, axis=0)
        return cls(
            members=members,
            constant=0.0,
            linear=np.zeros(sizes.shape),
            basis=np.zeros((0, len(members), 0)),
            coordinates=np.zeros((*sizes.shape, 0)),
            sizes=sizes,
            allowed=np.ones(sizes.shape, dtype=np.bool_),
        )

    @property
    def groups(self) -> int:
        """Number of groups, G."""
        return len(self.members)

    @property
    def rank(self) -> int:
        """Number of directions in which groups couple; 0 where losses just add up."""
        return int(self.basis.shape[0])

    @property
    def flat_basis(self) -> Array:
        """The basis as a matrix, [rank, G * D]."""
        return self.basis.reshape(self.rank, self.groups * self.basis.shape[2])

    def restricted_to(self, allowed: NDArray[np.bool_]) -> "Program":
        """Return the program that allows only what `allowed` [G, K], and this program, allow."""
        return replace(self, allowed=self.allowed & allowed)

    def loss(self, choice: Choice) -> float:
        """Return the loss of a choice, int64 [G]."""
        rows = np.arange(self.groups)
        effect = np.einsum("rgd,gd->r", self.basis, self.coordinates[rows, choice])
        return float(self.constant + self.linear[rows, choice].sum() + effect @ effect / 2)

    def loss_of_shares(self, share: Array) -> float:
        """Return the loss of shares x [G, K] whose rows sum to 1."""
        effect = self.effect(share)
        return float(self.constant + (self.linear * share).sum() + effect @ effect / 2)

    def effect(self, share: Array) -> Array:
        """Return the joint effect y [rank] of shares x [G, K]."""
        inner = np.einsum("gkd,gk->gd", self.coordinates, share)
        return np.asarray(self.flat_basis @ inner.ravel(), dtype=np.float64)

    def gradient(self, effect: Array) -> Array:
        """Return the derivative of the loss by x, [G, K], at a joint effect y [rank]."""
        pull = (effect @ self.flat_basis).reshape(self.groups, self.basis.shape[2])
        return np.asarray(
            self.linear + np.einsum("gkd,gd->gk", self.coordinates, pull), dtype=np.float64
        )

    def used_bytes(self, choice: Choice) -> int:
        """Return the exact bytes of a choice, int64 [G]."""
        return int(self.sizes[np.arange(self.groups), choice].sum())

    def byte_range(self) -> tuple[int, int]:
        """Return the bytes of the smallest and of the largest allowed choice.

        Further limits are not looked at.
        """
        return int(self.smallest_sizes().sum()), self.used_bytes(self.largest_choice())

    def smallest_sizes(self) -> Bytes:
        """Return the bytes of the smallest allowed fidelity of each group, int64 [G]."""
        sizes = np.where(self.allowed, self.sizes, np.iinfo(np.int64).max)
        return np.asarray(sizes.min(axis=1), dtype=np.int64)

    def largest_choice(self) -> Choice:
        """Return the largest allowed fidelity of each group, the first of equals, int64 [G]."""
        sizes = np.where(self.allowed, self.sizes, -1)
        return np.asarray(sizes.argmax(axis=1), dtype=np.int64)

    def one_hot(self, choice: Choice) -> Array:
        """Return a choice, int64 [G], as shares x [G, K]."""
        return np.asarray(np.eye(self.sizes.shape[1])[choice], dtype=np.float64)

    def scale(self) -> float:
        """Return the largest loss that one group can change, the unit for what is negligible."""
        if self.rank:
            effects = np.einsum("rgd,gkd->rgk", self.basis, self.coordinates)
            own = self.linear + np.square(effects).sum(axis=0) / 2
        else:
            own = self.linear
        return float(np.abs(own).max()) or 1.0

    def per_layer(self, choice: Choice) -> Choice:
        """Return the choice of each layer, int64 [L], from that of each group."""
        layers = np.concatenate([np.array(group) for group in self.members])
        found = np.empty(len(layers), dtype=np.int64)
        found[layers] = np.repeat(choice, [len(group) for group in self.members])
        return found


def _members(groups: Sequence[Sequence[int]] | None, layers: int) -> tuple[tuple[int, ...], ...]:
    if groups is None:
        return tuple((at,) for at in range(layers))
    return tuple(tuple(group) for group in groups)


def _summed(values: NDArray[Any], members: Sequence[Sequence[int]], *, axis: int) -> NDArray[Any]:
    """Return values of layers, summed over each group along the axis of layers."""
    order = [at for group in members for at in group]
    starts = np.cumsum([0, *(len(group) for group in members[:-1])])
    return np.asarray(np.add.reduceat(values.take(order, axis=axis), starts, axis=axis))


def _factored(effect: Array) -> tuple[Array, Array]:
    """Return (basis [rank, G, D], coordinates [G, K, D]) of effects [rank, G, K].

    basis[:, g] @ coordinates[g].T = effect[:, g] for each g, by a singular value decomposition,
    with D as small as it can be.
    """
    _, groups, menu = effect.shape
    if not effect.any():
        return np.zeros((0, groups, 0)), np.zeros((groups, menu, 0))
    left, size, right = np.linalg.svd(effect.transpose(1, 0, 2), full_matrices=False)
    used = int((size > _SAME_DIRECTION * size.max()).any(axis=0).sum())
    basis = (left * size[:, None])[:, :, :used].transpose(1, 0, 2)
    coordinates = right[:, :used].transpose(0, 2, 1)
    return np.ascontiguousarray(basis), np.ascontiguousarray(coordinates)
