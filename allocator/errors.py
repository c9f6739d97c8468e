"""What can go wrong in the allocator, split by what the caller can do about it.

AllocatorError
├── ProfileError      the profile cannot be read, or its numbers make no sense
├── SignalUnknown     no signal has this name
├── BudgetError       the budget is not a size
├── BudgetInfeasible  no plan of the menu fits the budget; the message names the feasible range
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


class BudgetInfeasible(AllocatorError):
    """The budget is below the smallest plan of the menu."""


class BudgetNotNeeded(AllocatorError):
    """The budget is at least as large as the layers before quantization."""


class FormulationError(AllocatorError):
    """The optimisation problem breaks the rules that make re-solving fast; a bug, not the caller's doing."""


class SolverFailed(AllocatorError):
    """The solver stopped without a usable solution."""
