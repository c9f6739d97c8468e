"""Errors of the allocator, split by what the caller can do about them."""

from typing import Any

from quantizer.known_error import ExitCode, KnownError

_UNPROCESSABLE = 422
"""HTTP status of a question that is well-formed and has no answer."""


class AllocatorError(KnownError):
    """Base of every error that the allocator raises on purpose."""

    problem_type = "allocator-error"


class ProfileError(AllocatorError):
    """The profile is damaged, of another schema, or holds values that are not finite."""

    problem_type = "profile-error"


class SignalUnknown(AllocatorError):
    """No signal has this name."""

    problem_type = "signal-unknown"


class BudgetError(AllocatorError):
    """The budget cannot be read as a size."""

    problem_type = "budget-error"


class RuleError(AllocatorError):
    """A constraint cannot be read, or names a layer or a fidelity that does not exist."""

    problem_type = "rule-error"


class BudgetInfeasible(AllocatorError):
    """No plan fits the budget.

    Attributes:
        budget_bytes: the budget that was given.
        nearest_bytes: the smallest budget that a plan fits.
        largest_bytes: size of the largest plan; a larger budget is of no use.
        binding: what keeps plans from being smaller: `menu`, or names of rules and limits.
    """

    exit_code = ExitCode.IMPOSSIBLE
    http_status = _UNPROCESSABLE
    problem_type = "budget-infeasible"

    def __init__(
        self,
        message: str,
        *,
        budget_bytes: int = 0,
        nearest_bytes: int = 0,
        largest_bytes: int = 0,
        binding: tuple[str, ...] = (),
    ) -> None:
        """Take the message, and the values that a program needs to ask again."""
        super().__init__(message)
        self.budget_bytes = budget_bytes
        self.nearest_bytes = nearest_bytes
        self.largest_bytes = largest_bytes
        self.binding = binding

    @property
    def details(self) -> dict[str, Any]:
        """The budget, the range of budgets that can be met, and what binds."""
        return {
            "budget_bytes": self.budget_bytes,
            "nearest_bytes": self.nearest_bytes,
            "largest_bytes": self.largest_bytes,
            "binding": list(self.binding),
        }


class BudgetNotNeeded(AllocatorError):
    """The budget is at least as large as the layers before quantization."""

    exit_code = ExitCode.IMPOSSIBLE
    problem_type = "budget-not-needed"


class LimitInfeasible(AllocatorError):
    """No plan is within a limit other than the budget, or within all limits together."""

    exit_code = ExitCode.IMPOSSIBLE
    http_status = _UNPROCESSABLE
    problem_type = "limit-infeasible"


class LossUnreachable(AllocatorError):
    """No plan has a predicted loss as small as the one that is asked for."""

    exit_code = ExitCode.IMPOSSIBLE
    http_status = _UNPROCESSABLE
    problem_type = "loss-unreachable"


class FormulationError(AllocatorError):
    """The optimisation problem breaks the rules that make solving it again fast.

    This is a bug, not bad input.
    """

    exit_code = ExitCode.BUG
    problem_type = "formulation-error"


class SolverFailed(AllocatorError):
    """The solver stopped without a usable solution."""

    exit_code = ExitCode.BUG
    problem_type = "solver-failed"
