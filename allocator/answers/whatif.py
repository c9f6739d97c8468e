"""Budget what-ifs: one profile under one set of constraints, made ready once, asked many times in milliseconds.

Nothing here imports torch or CVXPY: the page, the API and the command line answer from it at once.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from allocator.answers.allocation import Allocation, LimitUse
from allocator.demands.constraints import FREE, Constraints
from allocator.demands.menu import bpw
from allocator.demands.rules import decide
from allocator.demands.ties import group_layers
from allocator.errors import BudgetInfeasible, LimitInfeasible, RuleError
from allocator.profile import Profile
from allocator.solver.curve import curve_of, smallest_share
from allocator.solver.distinct import Subset, likely_subsets, smallest_of_few
from allocator.solver.integer import smallest_choice
from allocator.solver.limits import limits_of
from allocator.solver.osqp_solver import ACCURACY, Relaxed
from allocator.solver.program import Choice, Program
from allocator.solver.rounding import FILLED, Rounder
from quantizer.plans.fidelity import Fidelity
from quantizer.plans.plan import LayerSpec


def check_feasible(
    layers: Sequence[LayerSpec],
    fidelities: Sequence[Fidelity],
    budget_bytes: int,
    constraints: Constraints,
) -> None:
    """Refuse, before anything is measured, what no plan of a menu could respect.

    Raises:
        RuleError: the constraints name what does not exist.
        LimitInfeasible: no plan is within the further limits, whatever the budget.
        BudgetInfeasible: no plan fits the budget.
    """
    shape = len(layers), len(fidelities)
    blank = Profile(
        "none",
        tuple(layers),
        tuple(fidelities),
        0,
        0.0,
        np.zeros(shape),
        np.zeros((0, shape[0] * shape[1])),
        0.0,
        0,
        "",
        "",
    )
    WhatIf(blank, constraints).check(budget_bytes)


class WhatIf:
    """The plans of one profile under one set of constraints."""

    def __init__(self, profile: Profile, constraints: Constraints = FREE) -> None:
        """Make the program ready.

        Raises:
            RuleError: the constraints name what does not exist.
            LimitInfeasible: no plan is within the further limits, whatever the budget.
            SolverFailed: the solver refuses the program.
        """
        self.profile, self.constraints = profile, constraints
        layers, fidelities = profile.layers, profile.fidelities
        tied = constraints.target != "transformers" or constraints.ties
        groups = group_layers(layers, constraints.target, constraints.ties, constraints.untied)
        program = Program.of(profile, groups if tied else None)
        self._menu_bytes = program.byte_range()
        self.decision = decide(layers, fidelities, groups, constraints.rules)
        self.program = replace(
            program.among(self.decision.allowed),
            limits=limits_of(constraints, layers, fidelities, groups),
        )
        self.curve, self._rounder = curve_of(self.program), Rounder(self.program)
        self._smallest_bytes = self._smallest()
        self._decided_by = self._rule_of_each_layer()
        self._trusted_bytes = profile.budget_range

    @property
    def byte_range(self) -> tuple[int, int]:
        """Smallest and largest budget that make a difference, in bytes."""
        return self._smallest_bytes, self.curve.largest_bytes

    def plan(self, budget_bytes: int) -> Allocation:
        """Return the plan of least modelled loss that fits `budget_bytes` and respects the constraints.

        The byte count is exact and never above the budget. A budget above the largest plan gets
        that plan, with a note.

        Raises:
            BudgetInfeasible: no plan fits; says what binds and the nearest budget that is feasible.
            LimitInfeasible: no plan was found within all limits together.
            SolverFailed: the solver gave no usable answer.
        """
        self.check(budget_bytes)
        most = self.constraints.most_distinct
        if most is not None and most < len(self.profile.fidelities):
            return self._plan_of_few(budget_bytes, most)
        relaxed = self.curve.at(budget_bytes)
        choice = (
            self._rounder.round(relaxed.share, relaxed.price, budget_bytes)
            if self._limited(budget_bytes)
            else self._largest()
        )
        return self._allocation(budget_bytes, choice, relaxed, relaxed.bound)

    def bound(self, budget_bytes: int) -> float:
        """Return the modelled loss that no plan within the budget can be below, [nats/token].

        Raises:
            BudgetInfeasible: no plan fits.
        """
        self.check(budget_bytes)
        return self.curve.at(budget_bytes).bound

    def _limited(self, budget_bytes: int) -> bool:
        return budget_bytes < self.curve.largest_bytes or bool(self.program.limits)

    def _largest(self) -> Choice:
        return np.asarray(
            np.where(self.program.allowed, self.program.sizes, -1).argmax(axis=1), dtype=np.int64
        )

    def _smallest(self) -> int:
        """Return the smallest budget that a plan within all constraints fits.

        Raises:
            RuleError: no plan of so few distinct fidelities keeps the rules.
        """
        smallest, most = self.curve.smallest_bytes, self.constraints.most_distinct
        if most is None:
            return smallest
        found = smallest_of_few(self.program, most)
        if found is None:
            raise RuleError(
                f"no plan of at most {most} distinct fidelities keeps the rules; allow more"
            )
        return max(smallest, found)

    def _plan_of_few(self, budget_bytes: int, most_distinct: int) -> Allocation:
        """Return the best plan over the most promising parts of the menu.

        The bound holds for all parts.
        """
        whole = self.curve.at(budget_bytes)
        best: tuple[float, Choice, Relaxed] | None = None
        bounds = []
        for subset in likely_subsets(self.program, whole, budget_bytes, most_distinct):
            found = self._plan_of_subset(subset, budget_bytes)
            bounds.append(max(subset.bound, found[0].bound) if found else subset.bound)
            if found is not None and (best is None or self.program.loss(found[1]) < best[0]):
                best = self.program.loss(found[1]), found[1], found[0]
        if best is None:
            raise LimitInfeasible(
                f"no plan of at most {most_distinct} distinct fidelities was found within all "
                "limits; allow more"
            )
        return self._allocation(budget_bytes, best[1], best[2], max(whole.bound, min(bounds)))

    def _plan_of_subset(self, subset: Subset, budget_bytes: int) -> tuple[Relaxed, Choice] | None:
        if not subset.examined:
            return None
        program = self.program.among(subset.allowed[None, :])
        try:
            curve = curve_of(program)
            if budget_bytes < curve.smallest_bytes:
                return None
            relaxed = curve.at(budget_bytes)
            return relaxed, Rounder(program).round(relaxed.share, relaxed.price, budget_bytes)
        except LimitInfeasible:
            return None

    def _allocation(
        self, budget_bytes: int, choice: Choice, relaxed: Relaxed, bound: float
    ) -> Allocation:
        program, rows = self.program, np.arange(self.program.groups)
        uses = tuple(
            LimitUse(
                limit.name, limit.unit, float(limit.cost[rows, choice].sum()), limit.most, price
            )
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

    def check(self, budget_bytes: int) -> None:
        """Refuse a budget that no plan fits.

        Raises:
            BudgetInfeasible: says what binds and the nearest budget that is feasible.
        """
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
        if self.curve.smallest_bytes > rules_smallest:
            binding += self._binding_limits()
        if smallest > self.curve.smallest_bytes:
            binding.append("distinct fidelities")
        raise BudgetInfeasible(
            f"budget {budget_bytes} bytes ({bpw(layers, budget_bytes):.3f} bpw) is below the "
            "smallest plan; feasible are "
            f"{smallest} to {largest} bytes ({bpw(layers, smallest):.3f} to "
            f"{bpw(layers, largest):.3f} bpw); "
            f"what binds: {', '.join(binding)}",
            budget_bytes=budget_bytes, nearest_bytes=smallest, largest_bytes=largest, binding=tuple(binding),
        )  # fmt: skip

    def _binding_rules(self) -> list[str]:
        """Return the rules that make the smallest plan larger, by how many bytes they do, most first."""
        sizes, rules, rows = (
            self.program.sizes,
            self.constraints.rules,
            np.arange(self.program.groups),
        )
        more: dict[str, int] = {}
        removed_by = self.decision.removed_by[rows, sizes.argmin(axis=1)].tolist()
        for index, extra in zip(
            removed_by, (self.program.smallest_sizes() - sizes.min(axis=1)).tolist(), strict=True
        ):
            if extra > 0:
                more[str(rules[index])] = more.get(str(rules[index]), 0) + extra
        return sorted(more, key=lambda rule: -more[rule])

    def _binding_limits(self) -> list[str]:
        """Return the limits without which plans could be smaller.

        All of them where only two together bind.
        """
        program, found = self.program, []
        for limit in program.limits:
            others = replace(
                program, limits=tuple(other for other in program.limits if other is not limit)
            )
            choice = (
                smallest_choice(others) if others.limits else smallest_share(others).argmax(axis=1)
            )
            if others.used_bytes(choice) < self.curve.smallest_bytes:
                found.append(limit.name)
        return found or [limit.name for limit in program.limits]

    def _notes(self, budget_bytes: int, used_bytes: int) -> tuple[str, ...]:
        notes, profile = [], self.profile
        slack = budget_bytes - used_bytes
        if FILLED * budget_bytes < slack and budget_bytes < self.curve.largest_bytes:
            notes.append(
                f"{slack} bytes are left: the profile predicts that no change which fits in them "
                "helps"
            )
        if budget_bytes >= self.curve.largest_bytes:
            largest = self.curve.largest_bytes
            notes.append(
                f"the budget holds the largest plan of the menu ({largest} bytes); the rest of it "
                "is not used"
            )
        low, high = self._trusted_bytes
        if profile.context is None:
            notes.append(
                "the profile was measured in the original model, where layers look more harmless "
                "than among quantized ones"
            )
        elif not low <= budget_bytes <= high:
            notes.append(
                "the profile was measured around a uniform plan of "
                f"{profile.fidelities[profile.context].name} and is trusted from "
                f"{low} to {high} bytes; for this budget, profile the model anew"
            )
        return tuple(notes)
