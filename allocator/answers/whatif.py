"""Budget what-ifs: one profile under one set of constraints, asked many times in milliseconds.

Nothing here imports torch or CVXPY, so that the web page, the API and the command line answer at
once.
"""

import numpy as np

from allocator.answers.allocation import Allocation, LimitUse
from allocator.answers.feasibility import FeasibleBudgets
from allocator.demands.constraints import UNCONSTRAINED, Constraints
from allocator.demands.ties import group_layers
from allocator.errors import LimitInfeasible
from allocator.profile import Profile
from allocator.solver.curve import curve_of
from allocator.solver.distinct import Subset, bounded_subsets
from allocator.solver.program import Choice, Program
from allocator.solver.relaxation import RelaxedSolution
from allocator.solver.rounding import UNUSED_SHARE, Rounder


class WhatIf:
    """The plans of one profile under one set of constraints.

    Several threads may ask one instance; where the solver has to run, one of them runs it while the
    others wait. An answer does not depend on what was asked before.
    """

    def __init__(self, profile: Profile, constraints: Constraints = UNCONSTRAINED) -> None:
        """Set the program up.

        Raises:
            RuleError: the constraints name what does not exist.
            LimitInfeasible: no plan is within the further limits, whatever the budget.
            SolverFailed: the solver refuses the program.
        """
        self.profile = profile
        self.constraints = constraints
        layers = profile.layers
        tied = constraints.target != "transformers" or constraints.ties
        groups = group_layers(layers, constraints.target, constraints.ties, constraints.untied)
        whole = Program.of(profile, groups if tied else None)
        self._feasible = FeasibleBudgets.of(whole, layers, profile.fidelities, constraints)
        self.program = self._feasible.program
        self.curve = curve_of(self.program, self._feasible.smallest)
        self._rounder = Rounder(self.program)
        self._decided_by = self._rule_of_each_layer()
        self._trusted_bytes = profile.budget_range

    @property
    def byte_range(self) -> tuple[int, int]:
        """Smallest and largest budget that make a difference, in bytes."""
        return self._feasible.smallest_bytes, self._feasible.largest_bytes

    def plan(self, budget_bytes: int) -> Allocation:
        """Return the plan of least modelled loss within the budget and the constraints.

        The byte count is exact and never above the budget. A budget above the largest plan gets
        that plan, with a note.

        Raises:
            BudgetInfeasible: no plan fits; names what binds and the nearest feasible budget.
            LimitInfeasible: no plan was found within all limits together.
            SolverFailed: the solver gave no usable answer.
        """
        self.check(budget_bytes)
        most = self.constraints.most_distinct
        if most is not None and most < len(self.profile.fidelities):
            return self._plan_of_few(budget_bytes, most)
        relaxed = self.curve.at(budget_bytes)
        if budget_bytes < self._feasible.largest_bytes or self.program.limits:
            choice = self._rounder.round(relaxed.share, relaxed.price, budget_bytes)
        else:
            choice = self.program.largest_choice()
        return self._allocation(budget_bytes, choice, relaxed, relaxed.bound)

    def bound(self, budget_bytes: int) -> float:
        """Return the modelled loss that no plan within the budget can be below, [nats/token].

        Raises:
            BudgetInfeasible: no plan fits.
            SolverFailed: the solver gave no usable answer.
        """
        self.check(budget_bytes)
        return self.curve.at(budget_bytes).bound

    def check(self, budget_bytes: int) -> None:
        """Refuse a budget that no plan fits.

        Raises:
            BudgetInfeasible: names what binds and the nearest feasible budget.
        """
        self._feasible.check(budget_bytes)

    def _plan_of_few(self, budget_bytes: int, most_distinct: int) -> Allocation:
        """Return the best plan over the most promising subsets of the menu.

        The bound holds for all subsets.
        """
        whole = self.curve.at(budget_bytes)
        best: tuple[Choice, RelaxedSolution] | None = None
        best_loss = np.inf
        bounds = []
        for subset in bounded_subsets(self.program, whole, budget_bytes, most_distinct):
            found = self._plan_of_subset(subset, budget_bytes) if subset.promising else None
            if found is None:
                bounds.append(subset.bound)
                continue
            choice, relaxed = found
            bounds.append(max(subset.bound, relaxed.bound))
            loss = self.program.loss(choice)
            if loss < best_loss:
                best, best_loss = found, loss
        if best is None:
            raise LimitInfeasible(
                f"no plan of at most {most_distinct} distinct fidelities was found within all "
                "limits; allow more"
            )
        return self._allocation(budget_bytes, *best, max(whole.bound, min(bounds)))

    def _plan_of_subset(
        self, subset: Subset, budget_bytes: int
    ) -> tuple[Choice, RelaxedSolution] | None:
        """Return the best choice among a subset of the menu, or None where none was found."""
        program = self.program.restricted_to(subset.allowed[None, :])
        try:
            curve = curve_of(program)
            if budget_bytes < curve.smallest_bytes:
                return None
            relaxed = curve.at(budget_bytes)
            return Rounder(program).round(relaxed.share, relaxed.price, budget_bytes), relaxed
        except LimitInfeasible:
            return None

    def _allocation(
        self, budget_bytes: int, choice: Choice, relaxed: RelaxedSolution, bound: float
    ) -> Allocation:
        program = self.program
        limits = tuple(
            LimitUse(limit.name, limit.unit, limit.used(choice), limit.most, price)
            for limit, price in zip(program.limits, relaxed.limit_prices, strict=True)
        )
        weight_bytes = program.used_bytes(choice)
        return Allocation(
            plan=self.profile.plan(program.per_layer(choice)),
            weight_bytes=weight_bytes,
            budget_bytes=budget_bytes,
            predicted_loss=program.loss(choice),
            bound=bound,
            price=relaxed.price,
            limits=limits,
            decided_by=self._decided_by,
            status="solved" if relaxed.accurate else "inaccurate",
            solver=self.curve.solver,
            notes=self._notes(budget_bytes, weight_bytes),
        )

    def _rule_of_each_layer(self) -> tuple[str, ...]:
        """Return the rule that decided each layer, empty where none did, or nothing at all."""
        if not self.constraints.rules:
            return ()
        found = [""] * len(self.profile.layers)
        decided_by = self._feasible.rules.decided_by
        for group, rule in zip(self.program.members, decided_by, strict=True):
            for at in group:
                found[at] = str(rule or "")
        return tuple(found)

    def _notes(self, budget_bytes: int, weight_bytes: int) -> tuple[str, ...]:
        """Return what the caller should know about a plan, in sentences."""
        notes = []
        profile = self.profile
        unused_bytes = budget_bytes - weight_bytes
        largest = self._feasible.largest_bytes
        if budget_bytes >= largest:
            notes.append(
                f"the budget holds the largest plan of the menu ({largest} bytes); the rest of it "
                "is not used"
            )
        elif unused_bytes > UNUSED_SHARE * budget_bytes:
            notes.append(
                f"{unused_bytes} bytes are left: the profile predicts that no change which fits in "
                "them helps"
            )
        low, high = self._trusted_bytes
        if profile.context is None:
            notes.append(
                "the profile was measured in the original model, where quantizing a layer does "
                "less harm than among quantized layers"
            )
        elif not low <= budget_bytes <= high:
            notes.append(
                "the profile was measured around a uniform plan of "
                f"{profile.fidelities[profile.context].name} and is trusted from "
                f"{low} to {high} bytes; for this budget, profile the model anew"
            )
        return tuple(notes)
