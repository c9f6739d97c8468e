"""How the command of a stage is run, wherever that is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class Stopped(Exception):
    """The stage was stopped on request."""


@dataclass(frozen=True, slots=True)
class StageCall:
    """One start of a stage.

    Attributes:
        command: program and arguments.
        environment: all variables that it gets.
        max_seconds: after these it is killed.
    """

    command: Sequence[str]
    environment: Mapping[str, str]
    max_seconds: float


class StageRunner(Protocol):
    """Runs commands of stages.

    A command writes JSON documents to its standard output, one a line: `{"progress": {...}}` as it
    goes on, and at last `{"outcome": {...}}` or `{"problem": {...}}`. Its standard error is for
    people.
    """

    def run(
        self,
        call: StageCall,
        on_progress: Callable[[dict[str, Any]], None],
        on_log: Callable[[list[str]], None],
        must_stop: Callable[[], bool],
    ) -> dict[str, Any]:
        """Run a command to its end and return its last document.

        Raises:
            Stopped: `must_stop` returned true; nothing of the command runs any more.
            StageKilled: it ended without a result.
        """
        ...
