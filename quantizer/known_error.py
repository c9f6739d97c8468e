"""What every error that Bitwright raises on purpose carries with it.

The class of an error decides its exit code, its HTTP status and its problem type (RFC 9457), so
that the command line and the REST API report it without a table of their own.
"""

from collections.abc import Mapping
from enum import IntEnum
from typing import Any, ClassVar


class ExitCode(IntEnum):
    """Exit codes of the command line."""

    OK = 0
    BUG = 1
    """An error that nobody foresaw; it shows its traceback."""
    BAD_INPUT = 2
    """The input has to be corrected."""
    IMPOSSIBLE = 3
    """The input is sound, but the result cannot be produced here or now."""
    INTERRUPTED = 130
    """The user pressed Ctrl-C."""


class KnownError(Exception):
    """Base of every error that is reported in one sentence and without a traceback.

    The message says what is wrong, which value, and what to do next.

    Attributes:
        exit_code: exit code of a command that fails with it.
        http_status: status of an answer of the REST API that reports it.
        problem_type: last part of its problem type `urn:bitwright:problem:...`. Clients compare
            it, so it stays when a class is renamed.
        http_headers: headers that the answer needs beside the problem document.
    """

    exit_code: ClassVar[ExitCode] = ExitCode.BAD_INPUT
    http_status: ClassVar[int] = 400
    problem_type: ClassVar[str]
    http_headers: ClassVar[Mapping[str, str]] = {}

    @property
    def details(self) -> dict[str, Any]:
        """Values that a program needs to go on, as members of the problem document."""
        return {}
