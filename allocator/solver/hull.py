"""The relaxed program where damages just add up and bytes are the only limit.

Solved exactly, for all budgets at once.

Each group's useful fidelities are the corners of the lower convex hull of its (bytes, loss) points.
Going along a hull saves less loss per byte with every step, so the relaxed optimum takes the steps
of all groups in the order of their rates until the budget is used up, the last step in part (Sinha
and Zoltners 1979, for the multiple-choice knapsack problem).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from allocator.profile import Array
from allocator.solver.program import Program


class HullPoint(NamedTuple):
    """The relaxed optimum of one budget.

    Shares [G, K] and the rate of the last step that was taken, [nats/token/byte].
    """

    share: Array
    price: float


@dataclass(frozen=True, slots=True)
class Hull:
    """All steps along the hulls of all groups, best rate first.

    Attributes:
        start: the smallest fidelity of each group, of equals the least harmful, [G].
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
        sizes, loss = program.sizes, np.where(program.allowed, program.linear, np.inf)
        size_now = program.smallest_sizes()
        here = np.where(sizes == size_now[:, None], loss, np.inf).argmin(axis=1)
        rows, start = np.arange(program.groups), here
        groups, options, rates, steps = [], [], [], []
        for _ in range(sizes.shape[1] - 1):
            more, saved = sizes - sizes[rows, here][:, None], loss[rows, here][:, None] - loss
            rate = np.where((more > 0) & np.isfinite(loss), saved / np.maximum(more, 1), -np.inf)
            best = rate.max(axis=1)
            going = np.flatnonzero(best > 0)
            if not len(going):
                break
            there = np.where(rate == best[:, None], more, -1).argmax(
                axis=1
            )  # of equal rates the longest step
            groups.append(going)
            options.append(there[going])
            rates.append(best[going])
            steps.append(more[going, there[going]])
            here = here.copy()
            here[going] = there[going]
        if not groups:
            none = np.zeros(0, dtype=np.int64)
            return cls(start, none, none, np.zeros(0), none, int(size_now.sum()), sizes.shape[1])
        group, option, rate, step = (
            np.concatenate(parts) for parts in (groups, options, rates, steps)
        )
        order = np.argsort(-rate, kind="stable")
        ends = int(size_now.sum()) + np.cumsum(step[order])
        return cls(
            start,
            group[order],
            option[order],
            rate[order],
            ends,
            int(size_now.sum()),
            sizes.shape[1],
        )

    def at(self, budget_bytes: int) -> HullPoint:
        """Return the relaxed optimum within a budget that holds the smallest choice."""
        whole = int(np.searchsorted(self.end_bytes, budget_bytes, side="right"))
        choice = self.start.copy()
        choice[self.group[:whole]] = self.option[:whole]  # of a group's steps the last one stays
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
