"""Every error that leaves a handler becomes a problem document."""

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import InterfaceError, OperationalError
from starlette.exceptions import HTTPException

from allocator.errors import AllocatorError
from quantizer.errors import QuantizerError
from service.errors import BodyTooLarge, NoCredentials, QuotaExceeded, ServiceError, Unavailable
from service.problems import plain, problem_of

RETRY_AFTER_SECONDS = "5"
CONTENT_TYPE = "application/problem+json"
logger = logging.getLogger("bitwright.api")

DOCUMENTED: dict[str, Any] = {
    "description": "A problem (RFC 9457).",
    "content": {CONTENT_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemOut"}}},
}
"""How a problem is described in the OpenAPI document."""

_UNPROCESSABLE, _BUG = 422, 500


def respond(document: dict[str, Any], headers: dict[str, str] | None = None) -> JSONResponse:
    """Return a problem document as a response."""
    return JSONResponse(document, document["status"], headers, CONTENT_TYPE)


def install(app: FastAPI) -> None:
    """Make every error that leaves a handler a problem."""
    for tree in (AllocatorError, QuantizerError, ServiceError):
        app.add_exception_handler(tree, _told)
    for database in (OperationalError, InterfaceError):
        app.add_exception_handler(database, _away)
    app.add_exception_handler(RequestValidationError, _refused)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _bug)


def _told(_: Request, error: Exception) -> JSONResponse:
    headers = (
        {"Retry-After": RETRY_AFTER_SECONDS}
        if isinstance(error, Unavailable | QuotaExceeded)
        else {}
    )
    if isinstance(error, NoCredentials):
        headers["WWW-Authenticate"] = "Bearer"
    return respond(problem_of(error), headers)


def _away(request: Request, error: Exception) -> JSONResponse:
    logger.error(
        "%s %s: the database does not answer: %s",
        request.method,
        request.url.path,
        type(error).__name__,
    )
    return _told(request, Unavailable("the database does not answer; try again"))


def _refused(_: Request, error: Exception) -> JSONResponse:
    # what was sent is not repeated: it may hold secrets
    errors = error.errors() if isinstance(error, RequestValidationError) else []
    places = [
        {"at": ".".join(str(part) for part in row["loc"]), "message": row["msg"]} for row in errors
    ]
    detail = "; ".join(f"{place['at']}: {place['message']}" for place in places)
    return respond(plain("invalid-request", _UNPROCESSABLE, detail) | {"errors": places})


def _http(_: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, HTTPException):
        raise error
    if isinstance(error.__cause__, BodyTooLarge):  # it was raised while a body was read
        return respond(problem_of(error.__cause__))
    slug = str(error.detail).lower().replace(" ", "-")
    return respond(plain(slug, error.status_code, str(error.detail)), dict(error.headers or {}))


def _bug(request: Request, error: Exception) -> JSONResponse:
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return respond(plain("bug", _BUG, "an error of the service; its log says more"))
