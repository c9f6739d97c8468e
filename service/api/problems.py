"""Errors as RFC 9457 problems: a stable type, one sentence, and what a program needs to go on."""

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from allocator.errors import AllocatorError, BudgetInfeasible, LimitInfeasible, LossUnreachable
from quantizer.errors import QuantizerError
from service.errors import BodyTooLarge, ProfileUnknown, ServiceError, StorageError

CONTENT_TYPE = "application/problem+json"
logger = logging.getLogger("bitwright.api")

_STATUS: dict[type[Exception], int] = {ProfileUnknown: 404, BodyTooLarge: 413, StorageError: 507}
_INFEASIBLE = (BudgetInfeasible, LimitInfeasible, LossUnreachable)
_BAD_REQUEST, _UNPROCESSABLE, _BUG = 400, 422, 500


def problem_of(error: Exception) -> dict[str, Any]:
    """Return the problem document of an error of ours.

    Its type is the error's name in kebab case. A budget that cannot be met says what binds and the nearest one that can.
    """
    name = "".join(f"-{letter.lower()}" if letter.isupper() else letter for letter in type(error).__name__).strip("-")
    status = _STATUS.get(type(error), _UNPROCESSABLE if isinstance(error, _INFEASIBLE) else _BAD_REQUEST)
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


def respond(document: dict[str, Any], headers: dict[str, str] | None = None) -> JSONResponse:
    """Return a problem document as a response."""
    return JSONResponse(document, document["status"], headers, CONTENT_TYPE)


def install(app: FastAPI) -> None:
    """Make every error that leaves a handler a problem."""

    def told(_: Request, error: Exception) -> JSONResponse:
        return respond(problem_of(error))

    def refused(_: Request, error: Exception) -> JSONResponse:
        # what was sent is not repeated: it may hold secrets
        errors = error.errors() if isinstance(error, RequestValidationError) else []
        places = [{"at": ".".join(str(part) for part in row["loc"]), "message": row["msg"]} for row in errors]
        detail = "; ".join(f"{place['at']}: {place['message']}" for place in places)
        return respond(plain("invalid-request", _UNPROCESSABLE, detail) | {"errors": places})

    def http(_: Request, error: Exception) -> JSONResponse:
        if not isinstance(error, HTTPException):
            raise error
        if isinstance(error.__cause__, BodyTooLarge):  # it was raised while a body was read
            return respond(problem_of(error.__cause__))
        slug = str(error.detail).lower().replace(" ", "-")
        return respond(plain(slug, error.status_code, str(error.detail)), dict(error.headers or {}))

    def bug(request: Request, error: Exception) -> JSONResponse:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return respond(plain("bug", _BUG, "an error of the service; its log says more"))

    for tree in (AllocatorError, QuantizerError, ServiceError):
        app.add_exception_handler(tree, told)
    app.add_exception_handler(RequestValidationError, refused)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, bug)


def plain(slug: str, status: int, detail: str) -> dict[str, Any]:
    """Return a problem document that no error of ours stands behind."""
    return {"type": f"urn:bitwright:problem:{slug}", "title": slug.replace("-", " "), "status": status, "detail": detail}
