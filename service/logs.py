"""Log messages: lines on a terminal, JSON elsewhere, each with its job, stage and request."""

import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog
import structlog.tracebacks
from asgi_correlation_id import correlation_id
from rich.console import Console

err = Console(stderr=True, soft_wrap=True)

_FIELDS: list[Any] = [
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.stdlib.ExtraAdder(allow=("job_id", "stage", "tenant", "worker")),
    structlog.processors.TimeStamper(fmt="iso", utc=True),
]

_TRACEBACKS = structlog.processors.ExceptionRenderer(
    structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
)
"""Tracebacks without the values of variables, which may be secrets."""


def set_up_service_logging(*, as_json: bool | None = None) -> None:
    """Send messages of the service and of its libraries to stderr.

    Args:
        as_json: whether as JSON; None means unless stderr is a terminal.
    """
    plain = sys.stderr.isatty() if as_json is None else not as_json
    last: Any = structlog.dev.ConsoleRenderer() if plain else structlog.processors.JSONRenderer()
    tracebacks: list[Any] = [] if plain else [_TRACEBACKS]
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=_FIELDS,
        processors=[
            _with_request,
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            *tracebacks,
            last,
        ],
    )
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    ours = logging.getLogger("bitwright")
    ours.handlers = []
    ours.propagate = True
    ours.setLevel(logging.INFO)
    for name in ("dbos", "uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers = []
        logging.getLogger(name).propagate = True


def _with_request(_: Any, __: str, message: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    request = correlation_id.get()
    if request is not None:
        message["request_id"] = request
    return message


class _Messages(logging.Handler):
    """Prints log records on stderr, one line each."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        err.print(
            f"{record.levelname.lower()}: {record.getMessage()}", markup=False, highlight=False
        )


def set_up_logging() -> None:
    """Send the messages of Bitwright to stderr, one line each, and no others."""
    logger = logging.getLogger("bitwright")
    logger.handlers = [_Messages()]
    logger.setLevel(logging.INFO)
    logger.propagate = False
