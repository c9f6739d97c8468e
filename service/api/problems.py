"""Every error that leaves a handler becomes a problem document."""

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import InterfaceError, OperationalError
from starlette.exceptions import HTTPException

from quantizer.known_error import KnownError
from service.errors import BodyTooLarge, Unavailable
from service.problems import problem_document, problem_of
from service.validation import join

CONTENT_TYPE = "application/problem+json"
logger = logging.getLogger("bitwright.api")

DOCUMENTED: dict[str, Any] = {
    "description": "A problem (RFC 9457).",
    "content": {CONTENT_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemOut"}}},
}
"""How a problem is described in the OpenAPI document."""

_UNPROCESSABLE = 422
_LONGEST_SHOWN = 200
_WANTED = {
    "int_parsing": "a whole number",
    "float_parsing": "a number",
    "bool_parsing": "true or false",
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
}
"""What to give instead of a value of a query, by pydantic's type of the error."""


def respond(document: dict[str, Any], headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return a problem document as a response."""
    return JSONResponse(document, document["status"], headers, CONTENT_TYPE)


def respond_to(error: Exception) -> JSONResponse:
    """Return an error as a response."""
    headers = error.http_headers if isinstance(error, KnownError) else None
    return respond(problem_of(error), headers)


def install(app: FastAPI) -> None:
    """Make every error that leaves a handler a problem."""
    app.add_exception_handler(KnownError, lambda _, error: respond_to(error))
    for database in (OperationalError, InterfaceError):
        app.add_exception_handler(database, _database_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _bug)


def _database_error(request: Request, error: Exception) -> JSONResponse:
    logger.error(
        "%s %s: the database does not answer: %s",
        request.method,
        request.url.path,
        type(error).__name__,
    )
    return respond_to(Unavailable("the database does not answer; try again"))


def _validation_error(_: Request, error: Exception) -> JSONResponse:
    # rejected values are repeated for options only: others may hold secrets
    errors = error.errors() if isinstance(error, RequestValidationError) else []
    places = [
        {"at": ".".join(str(part) for part in row["loc"]), "message": _sentence(row)}
        for row in errors
    ]
    detail = "; ".join(place["message"] for place in places)
    return respond(problem_document("invalid-request", _UNPROCESSABLE, detail) | {"errors": places})


def _sentence(row: Mapping[str, Any]) -> str:
    """Return what is wrong with a part of a request."""
    place, kind = row["loc"], row["type"]
    if kind == "json_invalid":
        return f"the body is not JSON: {row['ctx']['error']}, at character {place[-1]}"
    if place == ("body",) and kind == "missing":
        return "the body is missing; send a JSON object"
    if place == ("body",) and isinstance(row.get("input"), bytes):
        return "the body is not declared to be JSON; send the header content-type: application/json"
    if kind in _WANTED:
        return f"{place[-1]}: give {_WANTED[kind].format(**row.get('ctx', {}))}"
    return join([row])


def _http_error(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, HTTPException):
        raise error
    if isinstance(error.__cause__, BodyTooLarge):  # it was raised while a body was read
        return respond_to(error.__cause__)
    slug = str(error.detail).lower().replace(" ", "-")
    detail = str(error.detail)
    if error.detail == HTTPStatus(error.status_code).phrase:  # no handler has said more
        detail = f"{request.method} {request.url.path[:_LONGEST_SHOWN]}: {slug.replace('-', ' ')}"
        detail += "; /docs lists what there is"
    return respond(problem_document(slug, error.status_code, detail), error.headers)


def _bug(request: Request, error: Exception) -> JSONResponse:
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return respond_to(error)
