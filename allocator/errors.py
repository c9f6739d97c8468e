"""What can go wrong in the allocator, split by what the caller can do about it.

AllocatorError
├── ProfileError      the profile cannot be read, or its numbers make no sense
├── SignalUnknown     no signal has this name
├── BudgetError       the budget is not a size
├── RuleError         a rule, tie, pool or table cannot be understood, or names what does not exist
├── BudgetInfeasible  no plan of the menu fits the budget; the message names the feasible range
├── LimitInfeasible   no plan is within another limit, whatever the budget
├── LossUnreachable   no plan of the menu has the wanted loss
├── BudgetNotNeeded   the budget holds the layers as they are; there is nothing to do
├── FormulationError  the program is not as the solver needs it: a bug of ours
└── SolverFailed      the solver gave no usable answer
"""


class AllocatorError(Exception):
    """Base of every error that the allocator raises on purpose."""


class ProfileError(AllocatorError):
    """The profile is damaged, of another schema, or holds values that are not finite."""


class SignalUnknown(AllocatorError):
    """There is no signal of this name."""


class BudgetError(AllocatorError):
    """The budget cannot be understood as a size."""


class RuleError(AllocatorError):
    """A demand on the plan cannot be understood, or names a layer or a fidelity that does not exist."""


class BudgetInfeasible(AllocatorError):
    """No plan fits the budget.

    Attributes:
        budget_bytes: what was asked for.
        nearest_bytes: the smallest budget that a plan fits.
        largest_bytes: the largest plan; more is of no use.
        binding: what keeps plans from being smaller: `menu`, or the rules and limits that do.
    """

    def __init__(
        self,
        message: str,
        *,
        budget_bytes: int = 0,
        nearest_bytes: int = 0,
        largest_bytes: int = 0,
        binding: tuple[str, ...] = (),
    ) -> None:
        """Take the message and what a program would want to know."""
        super().__init__(message)
        self.budget_bytes, self.nearest_bytes = budget_bytes, nearest_bytes
        self.largest_bytes, self.binding = largest_bytes, binding


class BudgetNotNeeded(AllocatorError):
    """The budget is at least as large as the layers before quantization."""


class FormulationError(AllocatorError):
    """The optimisation problem breaks the rules that make re-solving fast.

    A bug, not the caller's doing.
    """


class SolverFailed(AllocatorError):
    """The solver stopped without a usable solution."""


class LimitInfeasible(AllocatorError):
    """No plan is within a limit other than the budget, or within all of them together."""


class LossUnreachable(AllocatorError):
    """No plan of the menu has so small a loss."""
