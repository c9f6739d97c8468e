"""Errors as problem documents (RFC 9457)."""

from typing import Any

from quantizer.known_error import KnownError

_BUG_STATUS = 500


def problem_of(error: Exception) -> dict[str, Any]:
    """Return the problem document of an error.

    A known error has its own type and status, and adds the values that a program needs to go on.
    Any other error is a bug, and its message is not disclosed.
    """
    if not isinstance(error, KnownError):
        return problem_document("bug", _BUG_STATUS, "an internal error of the service; see its log")
    return problem_document(error.problem_type, error.http_status, str(error)) | error.details


def problem_document(slug: str, status: int, detail: str) -> dict[str, Any]:
    """Return the problem document of type `urn:bitwright:problem:<slug>`."""
    return {
        "type": f"urn:bitwright:problem:{slug}",
        "title": slug.replace("-", " "),
        "status": status,
        "detail": detail,
    }
