"""Runs the commands of stages on this machine."""

import json
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from service.errors import StageKilled
from service.process import PARENT_VARIABLE
from service.worker.fork_client import COMMAND, ForkClient
from service.worker.stage_runner import StageCall, Stopped
from service.worker.stream_reader import TICK_SECONDS, Process, StreamReader

GRACE_SECONDS = 5
"""Time that a stage has to end by itself after SIGTERM, before it is killed."""

_STOP_CHECK_SECONDS = 0.5

log = logging.getLogger("bitwright.runner")


class LocalRunner:
    """Runs each command as a process group of its own, which dies with this process.

    Commands of stages are forked from a process that has imported their libraries, see
    `ForkClient`.
    """

    def __init__(self) -> None:
        """Run nothing yet."""
        self._running: set[Process] = set()
        self._forks = ForkClient()
        self._is_halted = False
        self._lock = threading.Lock()

    def run(
        self,
        call: StageCall,
        on_progress: Callable[[dict[str, Any]], None],
        on_log: Callable[[list[str]], None],
        must_stop: Callable[[], bool],
    ) -> dict[str, Any]:
        """See `service.worker.stage_runner.StageRunner`."""
        process = self._start(call)
        try:
            return _follow(process, call.max_seconds, on_progress, on_log, must_stop)
        finally:
            _end(process)
            with self._lock:
                self._running.discard(process)
            self._block_if_halted()

    def _start(self, call: StageCall) -> Process:
        self._block_if_halted()
        is_stage = tuple(call.command[: len(COMMAND)]) == COMMAND
        process = self._fork(call) if is_stage else _open(call)
        with self._lock:
            self._running.add(process)
        return process

    def _fork(self, call: StageCall) -> Process:
        try:
            return self._forks.start(call.command, call.environment)
        except OSError as error:
            self._block_if_halted()
            raise StageKilled(f"the stage could not be started: {error}") from error

    def _block_if_halted(self) -> None:
        """Keep a thread from reporting the end of a stage when the whole process ends.

        The stage is to be started again another time.
        """
        while self._is_halted:
            time.sleep(TICK_SECONDS)

    def halt(self) -> None:
        """End everything that runs and start nothing more. Calls of `run` do not return.

        The caller ends the process then.
        """
        self._is_halted = True
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
    """End a process and its group: with SIGTERM, and after `GRACE_SECONDS` with SIGKILL."""
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


def _follow(
    process: Process,
    max_seconds: float,
    on_progress: Callable[[dict[str, Any]], None],
    on_log: Callable[[list[str]], None],
    must_stop: Callable[[], bool],
) -> dict[str, Any]:
    """Read what a process writes until it ends, and return its last document.

    Raises:
        Stopped: `must_stop` returned true.
        StageKilled: it took more than `max_seconds`, or ended without a result.
    """
    last: dict[str, Any] = {}
    reader = StreamReader(process)
    deadline = time.monotonic() + max_seconds
    checked = 0.0
    while not reader.is_done:
        documents, messages = reader.read()
        last = _handle(documents, on_progress) or last
        if messages:
            on_log(messages)
        now = time.monotonic()
        if now > deadline:
            raise StageKilled(
                f"the stage took more than {max_seconds:.0f} s and was stopped; raise the limit "
                "(BITWRIGHT_STAGE_SECONDS), or give the job fewer windows"
            )
        if now - checked >= _STOP_CHECK_SECONDS:
            checked = now
            if must_stop():
                raise Stopped
    code = process.wait()
    if not last:
        raise StageKilled(_reason(code))
    return last


def _handle(lines: list[str], on_progress: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Pass progress on, and return the last document that is a result."""
    last: dict[str, Any] = {}
    for line in lines:
        try:
            document = json.loads(line)
        except ValueError:
            log.warning("a stage wrote %r instead of a JSON document", line[:200])
            continue
        if "progress" in document:
            on_progress(document["progress"])
        else:
            last = document
    return last


def _reason(code: int) -> str:
    """Return why a stage has ended without a result, from its exit code."""
    if code == -signal.SIGKILL:
        return (
            "the stage was killed, most likely because memory ran out; use a smaller batch, "
            "fewer windows, or more memory"
        )
    if code < 0:
        return f"the stage was ended by signal {-code}; its log may say more"
    return f"the stage ended with exit code {code} and without a result; its log says more"
