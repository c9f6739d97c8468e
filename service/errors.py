"""Errors of the service, and the exit code of any error."""

from quantizer.known_error import ExitCode, KnownError

_AUTHENTICATE = {"WWW-Authenticate": "Bearer"}
_TRY_AGAIN = {"Retry-After": "5"}


class ServiceError(KnownError):
    """Base of every error that the service raises on purpose."""

    problem_type = "service-error"


class RequestError(ServiceError):
    """An option or argument is out of range, or contradicts another."""

    problem_type = "request-error"


class OutputError(ServiceError):
    """The output folder is in use, or is not a folder."""

    problem_type = "output-error"


class PathRefused(ServiceError):
    """A model or text lies outside the folders that jobs may use."""

    problem_type = "path-refused"


class TargetRefused(ServiceError):
    """A webhook may not be sent to this address."""

    problem_type = "target-refused"


class NoCredentials(ServiceError):
    """A request carries no API key or token that is valid."""

    http_status = 401
    problem_type = "no-credentials"
    http_headers = _AUTHENTICATE


class NotAllowed(ServiceError):
    """The key or token lacks the scope that this needs."""

    http_status = 403
    problem_type = "not-allowed"


class ProfileUnknown(ServiceError):
    """No profile has this digest."""

    http_status = 404
    problem_type = "profile-unknown"


class JobUnknown(ServiceError):
    """No job has this id."""

    http_status = 404
    problem_type = "job-unknown"


class WebhookUnknown(ServiceError):
    """No webhook has this id."""

    http_status = 404
    problem_type = "webhook-unknown"


class ArtifactUnknown(ServiceError):
    """No artifact has this name."""

    http_status = 404
    problem_type = "artifact-unknown"


class JobEnded(ServiceError):
    """The job has ended, so it cannot be cancelled."""

    http_status = 409
    problem_type = "job-ended"


class JobActive(ServiceError):
    """The job has not ended, so it can be neither retried nor deleted."""

    http_status = 409
    problem_type = "job-active"


class BodyTooLarge(ServiceError):
    """A request has more bytes than the service accepts."""

    http_status = 413
    problem_type = "body-too-large"


class KeyReused(ServiceError):
    """An idempotency key was used for a request with another body."""

    http_status = 422
    problem_type = "key-reused"


class QuotaExceeded(ServiceError):
    """The tenant has as many jobs, or stores as many bytes, as its quota allows."""

    http_status = 429
    problem_type = "quota-exceeded"
    http_headers = _TRY_AGAIN


class ArtifactDamaged(ServiceError):
    """An artifact's bytes differ from its checksum, or its manifest cannot be read."""

    http_status = 500
    problem_type = "artifact-damaged"


class Unavailable(ServiceError):
    """The database or the workers do not answer now; trying again later helps."""

    exit_code = ExitCode.IMPOSSIBLE
    http_status = 503
    problem_type = "unavailable"
    http_headers = _TRY_AGAIN


class StorageError(ServiceError):
    """The disk is full, or a file cannot be written; finished work is kept."""

    exit_code = ExitCode.IMPOSSIBLE
    http_status = 507
    problem_type = "storage-error"


class StageKilled(ServiceError):
    """A stage's process ended without a result: killed, out of memory, or out of time."""

    exit_code = ExitCode.IMPOSSIBLE
    problem_type = "stage-killed"


class DeliveryFailed(ServiceError):
    """A webhook's receiver was not reached, or did not answer in time.

    Trying again later may help.
    """

    exit_code = ExitCode.IMPOSSIBLE
    problem_type = "delivery-failed"


def exit_code_of(error: BaseException) -> ExitCode:
    """Return the process exit code for an error: its own, or that of a bug."""
    return error.exit_code if isinstance(error, KnownError) else ExitCode.BUG
