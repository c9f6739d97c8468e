"""Which budgets some plan fits under given constraints, and what keeps plans from being smaller."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from allocator.demands.constraints import Constraints
from allocator.demands.menu import budget_infeasible
from allocator.demands.rules import AllowedFidelities, apply_rules
from allocator.demands.ties import group_layers
from allocator.errors import RuleError
from allocator.solver.distinct import smallest_distinct
from allocator.solver.integer import smallest_choice
from allocator.solver.limits import limits_of
from allocator.solver.program import Choice, Program
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
    groups = group_layers(layers, constraints.target, constraints.ties, constraints.untied)
    program = Program.of_sizes(layers, fidelities, groups)
    FeasibleBudgets.of(program, layers, fidelities, constraints).check(budget_bytes)


@dataclass(frozen=True, slots=True)
class FeasibleBudgets:
    """The budgets that some plan fits.

    Attributes:
        layers: all layers.
        constraints: as the user states them.
        program: with the rules and the further limits.
        rules: the fidelities that the rules leave.
        menu_bytes: the smallest plan of the menu, rules and limits aside.
        smallest: the smallest choice within rules and further limits, int64 [G].
        smallest_bytes: the smallest budget that a plan within all constraints fits.
        largest_bytes: the largest plan within the rules.
    """

    layers: tuple[LayerSpec, ...]
    constraints: Constraints
    program: Program
    rules: AllowedFidelities
    menu_bytes: int
    smallest: Choice
    smallest_bytes: int
    largest_bytes: int

    @classmethod
    def of(
        cls,
        program: Program,
        layers: Sequence[LayerSpec],
        fidelities: Sequence[Fidelity],
        constraints: Constraints,
    ) -> "FeasibleBudgets":
        """Return the budgets that are feasible under constraints.

        Args:
            program: of these layers, in the groups that the constraints tie, all fidelities
                allowed, without further limits.
            layers: all layers.
            fidelities: the menu.
            constraints: what a plan must respect.

        Raises:
            RuleError: the constraints name what does not exist, or no plan of so few distinct
                fidelities keeps the rules.
            LimitInfeasible: no plan is within the further limits, whatever the budget.
        """
        menu_bytes, _ = program.byte_range()
        rules = apply_rules(layers, fidelities, program.members, constraints.rules)
        limits = limits_of(constraints, layers, fidelities, program.members)
        program = replace(program.restricted_to(rules.allowed), limits=limits)
        smallest = smallest_choice(program)
        _, largest_bytes = program.byte_range()
        return cls(
            layers=tuple(layers),
            constraints=constraints,
            program=program,
            rules=rules,
            menu_bytes=menu_bytes,
            smallest=smallest,
            smallest_bytes=max(program.used_bytes(smallest), _distinct_bytes(program, constraints)),
            largest_bytes=largest_bytes,
        )

    def check(self, budget_bytes: int) -> None:
        """Refuse a budget that no plan fits.

        Raises:
            BudgetInfeasible: names what binds and the nearest feasible budget.
        """
        if budget_bytes >= self.smallest_bytes:
            return
        rules_bytes, _ = self.program.byte_range()
        limits_bytes = self.program.used_bytes(self.smallest)
        binding: list[str] = []
        if budget_bytes < self.menu_bytes:
            binding.append("menu")
        if rules_bytes > self.menu_bytes:
            binding += self._binding_rules()
        if limits_bytes > rules_bytes:
            binding += self._binding_limits(limits_bytes)
        if self.smallest_bytes > limits_bytes:
            binding.append("distinct fidelities")
        feasible = self.smallest_bytes, self.largest_bytes
        raise budget_infeasible(self.layers, budget_bytes, feasible, tuple(binding))

    def _binding_rules(self) -> list[str]:
        """Return the rules that make the smallest plan larger, those that add most bytes first."""
        sizes = self.program.sizes
        added = self.program.smallest_sizes() - sizes.min(axis=1)
        removed_by = self.rules.removed_by[np.arange(self.program.groups), sizes.argmin(axis=1)]
        added_bytes: dict[str, int] = {}
        for index, more in zip(removed_by.tolist(), added.tolist(), strict=True):
            if more > 0:
                rule = str(self.constraints.rules[index])
                added_bytes[rule] = added_bytes.get(rule, 0) + more
        return sorted(added_bytes, key=lambda rule: -added_bytes[rule])

    def _binding_limits(self, limits_bytes: int) -> list[str]:
        """Return the limits without which plans could be smaller than `limits_bytes`.

        Where no single one does that, all of them bind together.
        """
        program = self.program
        binding = []
        for limit in program.limits:
            others = tuple(other for other in program.limits if other is not limit)
            without = replace(program, limits=others)
            if without.used_bytes(smallest_choice(without)) < limits_bytes:
                binding.append(limit.name)
        return binding or [limit.name for limit in program.limits]


def _distinct_bytes(program: Program, constraints: Constraints) -> int:
    """Return the bytes of the smallest plan of few distinct fidelities, 0 where any number may be.

    Raises:
        RuleError: no plan of so few distinct fidelities keeps the rules.
    """
    most = constraints.most_distinct
    if most is None:
        return 0
    smallest_bytes = smallest_distinct(program, most)
    if smallest_bytes is None:
        raise RuleError(
            f"no plan of at most {most} distinct fidelities keeps the rules; allow more"
        )
    return smallest_bytes
