"""A worker waits for a database that does not answer."""

import logging
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy.exc import InterfaceError, OperationalError
from tenacity import (
    RetryCallState,
    RetryError,
    Retrying,
    retry_if_exception_type,
    stop_after_delay,
    wait_exponential,
)

from service.errors import Unavailable

MAX_WAIT_SECONDS = 600.0
"""How long a worker waits for the database before the stage counts as failed."""

T = TypeVar("T")
log = logging.getLogger("bitwright.stages")


def retried(query: Callable[[], T]) -> T:
    """Return what `query` returns; repeat it while the database does not answer.

    Pauses grow from 0.1 to 5 s.

    Raises:
        Unavailable: the database did not answer within `MAX_WAIT_SECONDS`.
    """
    retrying = Retrying(
        retry=retry_if_exception_type((InterfaceError, OperationalError)),
        wait=wait_exponential(multiplier=0.1, max=5.0),
        stop=stop_after_delay(MAX_WAIT_SECONDS),
        before_sleep=_log_wait,
    )
    try:
        return retrying(query)
    except RetryError as error:
        raise Unavailable("the database did not answer") from error


def _log_wait(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    log.warning("the database does not answer, waiting: %s", type(error).__name__)
