"""What can go wrong in the service, and which exit code each error of the product has.

ServiceError
├── RequestError    an option or argument makes no sense
├── OutputError     the output folder cannot be used
├── ProfileUnknown  no profile has this digest
├── JobUnknown      no job has this id
├── JobEnded        it is too late to cancel the job
├── JobActive       the job must end first
├── WebhookUnknown  no webhook has this id
├── TargetRefused   a webhook target is not allowed
├── DeliveryFailed  a webhook's receiver was not reached, or gave no answer
├── KeyReused       an idempotency key came with another request
├── QuotaExceeded   a tenant has as much as it may have
├── ArtifactUnknown no such artifact
├── ArtifactDamaged its bytes differ from its checksum, or its manifest cannot be read
├── PathRefused     a model or text lies outside the folders that jobs may use
├── NoCredentials   a request says not who sends it
├── NotAllowed      who sends it may not do this
├── Unavailable     the database or the workers do not answer now
├── StageKilled     a stage's process ended without a result
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
from quantizer.errors import MemoryShort, QuantizerError


class ServiceError(Exception):
    """Base of every error that the service raises on purpose."""


class RequestError(ServiceError):
    """An option or argument is out of range or contradicts another."""


class OutputError(ServiceError):
    """The output folder is in use, or is no folder."""


class ProfileUnknown(ServiceError):
    """No profile has this digest."""


class JobUnknown(ServiceError):
    """No job has this id."""


class JobEnded(ServiceError):
    """The job has ended, so it cannot be cancelled."""


class JobActive(ServiceError):
    """The job has not ended, so it can be neither retried nor deleted."""


class WebhookUnknown(ServiceError):
    """No webhook has this id."""


class TargetRefused(ServiceError):
    """A webhook target is not allowed."""


class DeliveryFailed(ServiceError):
    """A webhook's receiver was not reached, or gave no answer in time.

    Trying again later may help.
    """


class KeyReused(ServiceError):
    """An idempotency key was used for a request with another body."""


class QuotaExceeded(ServiceError):
    """The tenant has as many jobs, or stores as many bytes, as it may."""


class ArtifactUnknown(ServiceError):
    """No such artifact."""


class ArtifactDamaged(ServiceError):
    """An artifact's bytes differ from its checksum, or its manifest cannot be read."""


class PathRefused(ServiceError):
    """A model or text lies outside the folders that jobs may use."""


class NoCredentials(ServiceError):
    """A request carries no API key or token that is valid."""


class NotAllowed(ServiceError):
    """The key or token lacks the scope that this needs."""


class Unavailable(ServiceError):
    """Something that the service needs does not answer now; trying again later helps."""


class StageKilled(ServiceError):
    """A stage's process ended without a result: killed, out of memory, or out of time."""


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
    JobUnknown,
    JobEnded,
    JobActive,
    WebhookUnknown,
    TargetRefused,
    KeyReused,
    QuotaExceeded,
    ArtifactUnknown,
    ArtifactDamaged,
    PathRefused,
    NoCredentials,
    NotAllowed,
    BodyTooLarge,
    QuantizerError,
    BudgetError,
    RuleError,
    ProfileError,
    SignalUnknown,
)
_IMPOSSIBLE = (
    MemoryShort,
    BudgetInfeasible,
    BudgetNotNeeded,
    LimitInfeasible,
    LossUnreachable,
    StorageError,
    Unavailable,
    StageKilled,
    DeliveryFailed,
)


def exit_code(error: BaseException) -> int:
    """Return the process exit code for an error.

    2 for input to correct, 3 for what cannot be done, 1 for a bug.
    """
    if isinstance(error, _IMPOSSIBLE):
        return EXIT_IMPOSSIBLE
    if isinstance(error, _BAD_INPUT):
        return EXIT_BAD_INPUT
    return EXIT_BUG
