"""How the command of a stage is run: `LocalRunner` on this machine.

Another engine may run the very same command elsewhere.
"""

import json
import logging
import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from service.errors import StageKilled
from service.process import PARENT_VARIABLE
from service.worker.fork_client import COMMAND as FORKED
from service.worker.fork_client import ForkClient, ForkedProcess

GRACE_SECONDS = 5
"""Time that a stage has to end by itself once it is told to, before it is killed."""

_TICK_SECONDS = 0.25
_LONGEST_LINE = 1_000_000

Process = subprocess.Popen[bytes] | ForkedProcess

log = logging.getLogger("bitwright.runner")


class Stopped(Exception):
    """The stage was stopped because somebody asked for it."""


@dataclass(frozen=True, slots=True)
class StageCall:
    """One start of a stage.

    Attributes:
        command: program and arguments.
        environment: all variables that it gets.
        most_seconds: after these it is killed.
    """

    command: Sequence[str]
    environment: Mapping[str, str]
    most_seconds: float


class StageRunner(Protocol):
    """Runs commands of stages.

    A command tells of itself in JSON, one document a line of its standard output: `{"progress":
    {...}}` as it goes on, and at last `{"outcome": {...}}` or `{"problem": {...}}`. Its standard
    error is for people.
    """

    def run(
        self,
        call: StageCall,
        on_progress: Callable[[dict[str, Any]], None],
        on_log: Callable[[list[str]], None],
        is_to_stop: Callable[[], bool],
    ) -> dict[str, Any]:
        """Run a command to its end and return its last document.

        Raises:
            Stopped: `is_to_stop` said so; nothing of the command runs any more.
            StageKilled: it ended without a result.
        """
        ...


class LocalRunner:
    """Runs each command as a process group of its own on this machine, which dies with this process.

    Commands of stages are forked from a process that has their libraries imported, see
    `ForkClient`.
    """

    def __init__(self) -> None:
        """Run nothing yet."""
        self._running: set[Process] = set()
        self._forks = ForkClient()
        self._halted = False
        self._lock = threading.Lock()

    def run(
        self,
        call: StageCall,
        on_progress: Callable[[dict[str, Any]], None],
        on_log: Callable[[list[str]], None],
        is_to_stop: Callable[[], bool],
    ) -> dict[str, Any]:
        """See `StageRunner.run`."""
        process = self._start(call)
        try:
            return _follow(process, call.most_seconds, on_progress, on_log, is_to_stop)
        finally:
            _end(process)
            with self._lock:
                self._running.discard(process)
            self._park_if_halted()

    def _start(self, call: StageCall) -> Process:
        self._park_if_halted()
        process = self._fork(call) if tuple(call.command[: len(FORKED)]) == FORKED else _open(call)
        with self._lock:
            self._running.add(process)
        return process

    def _fork(self, call: StageCall) -> Process:
        try:
            return self._forks.start(call.command, call.environment)
        except OSError as error:
            self._park_if_halted()
            raise StageKilled(f"the stage could not be started: {error}") from error

    def _park_if_halted(self) -> None:
        """Keep a thread from telling of a stage that ended because the whole process does.

        The stage is to go on another time.
        """
        while self._halted:
            time.sleep(_TICK_SECONDS)

    def halt(self) -> None:
        """End everything that runs, and start nothing more; calls of `run` do not return.

        Then end the process.
        """
        self._halted = True
        with self._lock:
            running = list(self._running)
        for process in running:
            _end(process)
        self._forks.stop()


def _open(call: StageCall) -> subprocess.Popen[bytes]:
    return subprocess.Popen(  # noqa: S603  a list of arguments, no shell
        list(call.command),
        env={**call.environment, PARENT_VARIABLE: str(os.getpid())},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def _end(process: Process) -> None:
    """End a process and its group: politely, then not."""
    if process.poll() is None:
        _signal(process, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    _signal(process, signal.SIGKILL)
    process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()


def _signal(process: Process, how: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # the whole group has ended
        os.killpg(process.pid, how)


class _Lines:
    """Cuts what a stream brings into lines."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _LONGEST_LINE:
            lines, self._rest = [*lines, self._rest[:_LONGEST_LINE]], b""
        return [
            line.decode("utf-8", "replace").replace("\0", "\ufffd")
            for line in lines
            if line.strip()
        ]


class _Ears:
    """Reads both streams of a process as they come."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._selector = selectors.DefaultSelector()
        self._lines = {
            stream: _Lines() for stream in (process.stdout, process.stderr) if stream is not None
        }
        for stream in self._lines:
            self._selector.register(stream, selectors.EVENT_READ)

    def listen(self) -> tuple[list[str], list[str]]:
        """Return new lines of standard output and of standard error, after waiting a moment for some."""
        heard: tuple[list[str], list[str]] = [], []
        for key, _ in self._selector.select(_TICK_SECONDS):
            stream: Any = key.fileobj
            data = os.read(key.fd, 65536)
            if not data:
                self._selector.unregister(stream)
            heard[stream is self._process.stderr].extend(self._lines[stream].feed(data or b"\n"))
        return heard

    @property
    def done(self) -> bool:
        """Whether nothing more will come.

        What the process itself started may still hold the streams.
        """
        return not self._selector.get_map() or (
            self._process.poll() is not None and not self._selector.select(_TICK_SECONDS)
        )


def _follow(
    process: Process,
    most_seconds: float,
    on_progress: Callable[[dict[str, Any]], None],
    on_log: Callable[[list[str]], None],
    is_to_stop: Callable[[], bool],
) -> dict[str, Any]:
    """Read what a process says until it ends; return its last document."""
    last: dict[str, Any] = {}
    deadline, looked, ears = time.monotonic() + most_seconds, 0.0, _Ears(process)
    while not ears.done:
        documents, messages = ears.listen()
        last = _hear(documents, on_progress) or last
        if messages:
            on_log(messages)
        now = time.monotonic()
        if now > deadline:
            raise StageKilled(
                f"the stage took more than {most_seconds:.0f} s and was stopped; allow more, or "
                "ask for less"
            )
        if now - looked >= 2 * _TICK_SECONDS:
            looked = now
            if is_to_stop():
                raise Stopped
    code = process.wait()
    if not last:
        raise StageKilled(_why(code))
    return last


def _hear(lines: list[str], on_progress: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Pass progress on; return the last document that is a result."""
    last: dict[str, Any] = {}
    for line in lines:
        try:
            document = json.loads(line)
        except ValueError:
            log.warning("a stage wrote %r where JSON belongs", line[:200])
            continue
        if "progress" in document:
            on_progress(document["progress"])
        else:
            last = document
    return last


def _why(code: int) -> str:
    if code == -signal.SIGKILL:
        return (
            "the stage was killed, most likely because memory ran out; use a smaller batch, "
            "fewer windows, or more memory"
        )
    if code < 0:
        return f"the stage was ended by signal {-code}; its log may say more"
    return f"the stage ended with exit code {code} and without a result; its log says more"
