"""What can go wrong in the service, and which exit code each error of the product has.

ServiceError
├── RequestError    an option or argument makes no sense
├── OutputError     the output folder cannot be used
├── ProfileUnknown  no profile has this digest
├── BodyTooLarge    a request has more bytes than are taken
└── StorageError    the disk is full, or a file cannot be written
"""

from allocator.errors import (
    AllocatorError,
    BudgetError,
    BudgetInfeasible,
    BudgetNotNeeded,
    LimitInfeasible,
    LossUnreachable,
    ProfileError,
    RuleError,
    SignalUnknown,
)
from quantizer.errors import QuantizerError


class ServiceError(Exception):
    """Base of every error that the service raises on purpose."""


class RequestError(ServiceError):
    """An option or argument is out of range or contradicts another."""


class OutputError(ServiceError):
    """The output folder is in use, or is no folder."""


class ProfileUnknown(ServiceError):
    """No profile has this digest."""


class BodyTooLarge(ServiceError):
    """A request has more bytes than the service takes."""


class StorageError(ServiceError):
    """Something could not be written; what was finished before is kept."""


EXIT_OK = 0
EXIT_BUG = 1
EXIT_BAD_INPUT = 2
EXIT_IMPOSSIBLE = 3
EXIT_INTERRUPTED = 130

KNOWN = (ServiceError, AllocatorError, QuantizerError)
"""Errors that are told in one sentence; any other is a bug and shows its traceback."""

_BAD_INPUT = (
    RequestError,
    OutputError,
    ProfileUnknown,
    BodyTooLarge,
    QuantizerError,
    BudgetError,
    RuleError,
    ProfileError,
    SignalUnknown,
)
_IMPOSSIBLE = (BudgetInfeasible, BudgetNotNeeded, LimitInfeasible, LossUnreachable, StorageError)


def exit_code(error: BaseException) -> int:
    """Return the process exit code for an error: 2 for input to correct, 3 for what cannot be done, 1 for a bug."""
    if isinstance(error, _IMPOSSIBLE):
        return EXIT_IMPOSSIBLE
    if isinstance(error, _BAD_INPUT):
        return EXIT_BAD_INPUT
    return EXIT_BUG
