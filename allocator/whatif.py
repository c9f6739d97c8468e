"""Budget what-ifs: one profile under one set of constraints, made ready once, asked many times in milliseconds.

Nothing here imports torch or CVXPY: the page, the API and the command line answer from it at once.
"""

from dataclasses import replace

import numpy as np

from allocator.allocation import Allocation, LimitUse
from allocator.compiled import ACCURACY, Relaxed
from allocator.constraints import Constraints, limits_of
from allocator.curve import Curve, curve_of
from allocator.distinct import Subset, likely_subsets
from allocator.errors import BudgetInfeasible
from allocator.menu import bpw
from allocator.profile import Profile
from allocator.program import Choice, Program
from allocator.rounding import FILLED, Rounder
from allocator.rules import decide
from allocator.ties import group_layers


class WhatIf:
    """The plans of one profile under one set of constraints."""

    def __init__(self, profile: Profile, constraints: Constraints | None = None) -> None:
        """Make the program ready.

        Raises:
            RuleError: the constraints name what does not exist.
            LimitInfeasible: no plan is within the further limits, whatever the budget.
            SolverFailed: the solver refuses the program.
        """
        constraints = constraints or Constraints()
        self.profile, self.constraints = profile, constraints
        layers, fidelities = profile.layers, profile.fidelities
        tied = constraints.target != "transformers" or constraints.ties
        groups = group_layers(layers, constraints.target, constraints.ties, constraints.untied)
        program = Program.of(profile, groups if tied else None)
        self._menu_bytes = program.byte_range()
        self.decision = decide(layers, fidelities, groups, constraints.rules)
        self.program = replace(program.among(self.decision.allowed), limits=limits_of(constraints, layers, fidelities, groups))
        self.curve, self._rounder = curve_of(self.program), Rounder(self.program)
        self._decided_by = self._rule_of_each_layer()
        self._trusted_bytes = profile.budget_range

    @property
    def byte_range(self) -> tuple[int, int]:
        """Smallest and largest budget that make a difference, in bytes."""
        return self.curve.smallest_bytes, self.curve.largest_bytes

    def plan(self, budget_bytes: int) -> Allocation:
        """Return the plan of least modelled loss that fits `budget_bytes` and respects the constraints.

        The byte count is exact and never above the budget. A budget above the largest plan gets that plan, with a note.

        Raises:
            BudgetInfeasible: no plan fits; says what binds and the nearest budget that is feasible.
            LimitInfeasible: no plan was found within all limits together.
            SolverFailed: the solver gave no usable answer.
        """
        self._check(budget_bytes)
        if self.constraints.most_distinct is not None:
            return self._plan_of_few(budget_bytes, self.constraints.most_distinct)
        relaxed, choice = self._solve(self.program, self.curve, self._rounder, budget_bytes)
        return self._allocation(budget_bytes, choice, relaxed, relaxed.bound)

    def bound(self, budget_bytes: int) -> float:
        """Return the modelled loss that no plan within the budget can be below, [nats/token].

        Raises:
            BudgetInfeasible: no plan fits.
        """
        self._check(budget_bytes)
        return self.curve.at(budget_bytes).bound

    def _solve(self, program: Program, curve: Curve, rounder: Rounder, budget_bytes: int) -> tuple[Relaxed, Choice]:
        relaxed = curve.at(budget_bytes)
        if budget_bytes >= curve.largest_bytes and not program.limits:
            return relaxed, np.where(program.allowed, program.sizes, -1).argmax(axis=1).astype(np.int64)
        return relaxed, rounder.round(relaxed.share, relaxed.price, budget_bytes)

    def _plan_of_few(self, budget_bytes: int, most_distinct: int) -> Allocation:
        """Return the best plan over the most promising parts of the menu; the bound holds for all parts."""
        whole = self.curve.at(budget_bytes)
        best: tuple[float, Choice, Relaxed] | None = None
        bounds = []
        for subset in likely_subsets(self.program, whole, budget_bytes, most_distinct):
            found = self._plan_of_subset(subset, budget_bytes)
            bounds.append(max(subset.bound, found[0].bound) if found else subset.bound)
            if found is not None and (best is None or self.program.loss(found[1]) < best[0]):
                best = self.program.loss(found[1]), found[1], found[0]
        if best is None:
            raise BudgetInfeasible(
                f"no plan of at most {most_distinct} distinct fidelities fits {budget_bytes} bytes and the rules; allow more",
                budget_bytes=budget_bytes, nearest_bytes=self.curve.smallest_bytes, largest_bytes=self.curve.largest_bytes,
                binding=("distinct fidelities",),
            )  # fmt: skip
        return self._allocation(budget_bytes, best[1], best[2], max(whole.bound, min(bounds)))

    def _plan_of_subset(self, subset: Subset, budget_bytes: int) -> tuple[Relaxed, Choice] | None:
        if not subset.examined:
            return None
        program = self.program.among(subset.allowed[None, :])
        curve = curve_of(program)
        if budget_bytes < curve.smallest_bytes:
            return None
        return self._solve(program, curve, Rounder(program), budget_bytes)

    def _allocation(self, budget_bytes: int, choice: Choice, relaxed: Relaxed, bound: float) -> Allocation:
        program, rows = self.program, np.arange(self.program.groups)
        uses = tuple(
            LimitUse(limit.name, limit.unit, float(limit.cost[rows, choice].sum()), limit.most, price)
            for limit, price in zip(program.limits, relaxed.limit_prices, strict=True)
        )
        return Allocation(
            plan=self.profile.plan(program.per_layer(choice)),
            weight_bytes=program.used_bytes(choice),
            budget_bytes=budget_bytes,
            predicted_loss=program.loss(choice),
            bound=bound,
            price=relaxed.price,
            limits=uses,
            decided_by=self._decided_by,
            status="solved" if relaxed.excess <= ACCURACY else "inaccurate",
            solver=self.curve.solver,
            notes=self._notes(budget_bytes, program.used_bytes(choice)),
        )

    def _rule_of_each_layer(self) -> tuple[str, ...]:
        if not self.constraints.rules:
            return ()
        found = [""] * len(self.profile.layers)
        for group, rule in zip(self.program.members, self.decision.decided_by, strict=True):
            for at in group:
                found[at] = str(rule or "")
        return tuple(found)

    def _check(self, budget_bytes: int) -> None:
        smallest, largest = self.byte_range
        if budget_bytes >= smallest:
            return
        layers, (menu_smallest, _) = self.profile.layers, self._menu_bytes
        rules_smallest, _ = self.program.byte_range()
        binding: list[str] = []
        if budget_bytes < menu_smallest:
            binding.append("menu")
        if rules_smallest > menu_smallest:
            binding += self._binding_rules()
        if smallest > rules_smallest:
            binding += [limit.name for limit in self.program.limits]
        raise BudgetInfeasible(
            f"budget {budget_bytes} bytes ({bpw(layers, budget_bytes):.3f} bpw) is below the smallest plan; feasible are "
            f"{smallest} to {largest} bytes ({bpw(layers, smallest):.3f} to {bpw(layers, largest):.3f} bpw); "
            f"what binds: {', '.join(binding)}",
            budget_bytes=budget_bytes, nearest_bytes=smallest, largest_bytes=largest, binding=tuple(binding),
        )  # fmt: skip

    def _binding_rules(self) -> list[str]:
        """Return the rules that make the smallest plan larger, by how many bytes they do, most first."""
        sizes = self.program.sizes
        more: dict[str, int] = {}
        smallest = np.where(self.program.allowed, sizes, np.iinfo(np.int64).max).min(axis=1)
        for rule, extra in zip(self.decision.decided_by, (smallest - sizes.min(axis=1)).tolist(), strict=True):
            if extra > 0 and rule is not None:
                more[str(rule)] = more.get(str(rule), 0) + extra
        return sorted(more, key=lambda rule: -more[rule])

    def _notes(self, budget_bytes: int, used_bytes: int) -> tuple[str, ...]:
        notes, profile = [], self.profile
        slack = budget_bytes - used_bytes
        if FILLED * budget_bytes < slack and budget_bytes < self.curve.largest_bytes:
            notes.append(f"{slack} bytes are left: the profile predicts that no change which fits in them helps")
        if budget_bytes >= self.curve.largest_bytes:
            largest = self.curve.largest_bytes
            notes.append(f"the budget holds the largest plan of the menu ({largest} bytes); the rest of it is not used")
        low, high = self._trusted_bytes
        if profile.context is None:
            notes.append(
                "the profile was measured in the original model, where layers look more harmless than among quantized ones"
            )
        elif not low <= budget_bytes <= high:
            notes.append(
                f"the profile was measured around a uniform plan of {profile.fidelities[profile.context].name} and is trusted from "
                f"{low} to {high} bytes; for this budget, profile the model anew"
            )
        return tuple(notes)
