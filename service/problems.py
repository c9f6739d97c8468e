"""Errors as RFC 9457 problem documents.

A stable type, one sentence, and what a program needs to go on.
"""

from typing import Any

from allocator.errors import BudgetInfeasible, LimitInfeasible, LossUnreachable
from service.errors import (
    ArtifactDamaged,
    ArtifactUnknown,
    BodyTooLarge,
    JobActive,
    JobEnded,
    JobUnknown,
    KeyReused,
    NoCredentials,
    NotAllowed,
    ProfileUnknown,
    QuotaExceeded,
    StorageError,
    Unavailable,
    WebhookUnknown,
)

_STATUS: dict[type[Exception], int] = {
    NoCredentials: 401, NotAllowed: 403, ProfileUnknown: 404, JobUnknown: 404, ArtifactUnknown: 404, WebhookUnknown: 404,
    JobEnded: 409, JobActive: 409, BodyTooLarge: 413, KeyReused: 422, QuotaExceeded: 429,
    ArtifactDamaged: 500, Unavailable: 503, StorageError: 507,
}  # fmt: skip
_INFEASIBLE = (BudgetInfeasible, LimitInfeasible, LossUnreachable)
_BAD_REQUEST, _UNPROCESSABLE = 400, 422


def problem_of(error: Exception) -> dict[str, Any]:
    """Return the problem document of an error of ours.

    Its type is the error's name in kebab case. A budget that cannot be met says what binds and the
    nearest one that can.
    """
    name = "".join(
        f"-{letter.lower()}" if letter.isupper() else letter for letter in type(error).__name__
    ).strip("-")
    status = _STATUS.get(
        type(error), _UNPROCESSABLE if isinstance(error, _INFEASIBLE) else _BAD_REQUEST
    )
    document: dict[str, Any] = {
        "type": f"urn:bitwright:problem:{name}",
        "title": name.replace("-", " "),
        "status": status,
        "detail": str(error),
    }
    if isinstance(error, BudgetInfeasible):
        document |= {
            "budget_bytes": error.budget_bytes,
            "nearest_bytes": error.nearest_bytes,
            "largest_bytes": error.largest_bytes,
            "binding": list(error.binding),
        }
    return document


def plain(slug: str, status: int, detail: str) -> dict[str, Any]:
    """Return a problem document that no error of ours stands behind."""
    return {
        "type": f"urn:bitwright:problem:{slug}",
        "title": slug.replace("-", " "),
        "status": status,
        "detail": detail,
    }
