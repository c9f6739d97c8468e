"""Lower convex hulls, and the relaxation without coupling that they solve exactly.

Where losses just add up and bytes are the only limit, the useful fidelities of each group are the
corners of the lower convex hull of its (bytes, loss) points. Each step along a hull saves less loss
per byte than the one before, so the relaxed optimum takes the steps of all groups in order of these
rates until the budget is used up, the last step in part (Sinha and Zoltners 1979, for the
multiple-choice knapsack problem). One sort answers all budgets.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from allocator.profile import Array
from allocator.solver.program import Program


class HullPoint(NamedTuple):
    """The relaxed optimum of one budget.

    Attributes:
        share: of each fidelity in each group, [G, K].
        price: loss saved per byte by the last step that was taken, [nats/token/byte].
    """

    share: Array
    price: float


class HullSteps(NamedTuple):
    """One step along the hulls of N groups.

    Attributes:
        group: whose step it is, int64 [N].
        option: the fidelity that it leads to, int64 [N].
        rate: loss saved per byte, [N].
        more_bytes: bytes that it takes, int64 [N].
    """

    group: NDArray[np.int64]
    option: NDArray[np.int64]
    rate: Array
    more_bytes: NDArray[np.int64]


def hull_starts(sizes: NDArray[np.int64], loss: Array) -> NDArray[np.int64]:
    """Return the first corner of each hull, [G]: of the smallest options the one of least loss.

    Args:
        sizes: bytes, int64 [G, K].
        loss: float64 [G, K], infinite where an option is not allowed.
    """
    allowed = np.where(np.isfinite(loss), sizes, np.iinfo(np.int64).max)
    smallest = allowed.min(axis=1, keepdims=True)
    return np.asarray(np.where(allowed == smallest, loss, np.inf).argmin(axis=1))


def hull_steps(sizes: NDArray[np.int64], loss: Array) -> Iterator[HullSteps]:
    """Yield the steps from corner to corner of the lower convex hull of each group.

    The first item has the first step of every group that has one, the second item the second steps,
    and so on. Of options in one line, only the ends are corners.

    Args:
        sizes: bytes, int64 [G, K].
        loss: float64 [G, K], infinite where an option is not allowed.
    """
    rows = np.arange(len(sizes))
    here = hull_starts(sizes, loss)
    while True:
        more = sizes - sizes[rows, here][:, None]
        saved = loss[rows, here][:, None] - loss
        rate = np.where((more > 0) & np.isfinite(loss), saved / np.maximum(more, 1), -np.inf)
        best = rate.max(axis=1)
        going = np.flatnonzero(np.isfinite(best))
        if not len(going):
            return
        longest = np.where(rate == best[:, None], more, -1).argmax(axis=1)
        option = longest[going]
        yield HullSteps(going, option, best[going], more[going, option])
        here[going] = option


def lower_hull(sizes: NDArray[np.int64], loss: Array) -> list[int]:
    """Return the corners of the lower convex hull of points, in order of rising size.

    Args:
        sizes: int64 [N].
        loss: float64 [N].
    """
    start = hull_starts(sizes[None], loss[None]).tolist()
    return [*start, *(step.option.item() for step in hull_steps(sizes[None], loss[None]))]


@dataclass(frozen=True, slots=True)
class Hull:
    """All steps that save loss, along the hulls of all groups, best rate first.

    Attributes:
        start: first corner of each hull, [G].
        group: whose step it is, [N].
        option: the fidelity that it leads to, [N].
        rate: loss saved per byte, falling, [N].
        end_bytes: bytes of the choice once the step is taken, rising, [N].
        start_bytes: bytes of `start`.
        menu: number of fidelities.
    """

    start: NDArray[np.int64]
    group: NDArray[np.int64]
    option: NDArray[np.int64]
    rate: Array
    end_bytes: NDArray[np.int64]
    start_bytes: int
    menu: int

    @classmethod
    def of(cls, program: Program) -> "Hull":
        """Return the steps of a program without coupling; further limits are not looked at."""
        loss = np.where(program.allowed, program.linear, np.inf)
        none = np.zeros(0, dtype=np.int64)
        steps = [HullSteps(none, none, np.zeros(0), none), *hull_steps(program.sizes, loss)]
        group, option, rate, more_bytes = (
            np.concatenate(part) for part in zip(*steps, strict=True)
        )
        order = np.argsort(-rate, kind="stable")
        order = order[rate[order] > 0]
        start_bytes = int(program.smallest_sizes().sum())
        return cls(
            start=hull_starts(program.sizes, loss),
            group=group[order],
            option=option[order],
            rate=rate[order],
            end_bytes=start_bytes + np.cumsum(more_bytes[order]),
            start_bytes=start_bytes,
            menu=program.sizes.shape[1],
        )

    def at(self, budget_bytes: int) -> HullPoint:
        """Return the relaxed optimum within a budget that holds the smallest choice."""
        whole = int(np.searchsorted(self.end_bytes, budget_bytes, side="right"))
        choice = self.start.copy()
        choice[self.group[:whole]] = self.option[:whole]  # the last of a group's steps counts
        share = np.zeros((len(choice), self.menu))
        share[np.arange(len(choice)), choice] = 1
        if whole == len(self.group):
            return HullPoint(share, 0.0)
        begin = int(self.end_bytes[whole - 1]) if whole else self.start_bytes
        part = (budget_bytes - begin) / (int(self.end_bytes[whole]) - begin)
        group = int(self.group[whole])
        share[group, choice[group]] = 1 - part
        share[group, int(self.option[whole])] += part
        return HullPoint(share, float(self.rate[whole]))
