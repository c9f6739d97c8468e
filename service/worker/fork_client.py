"""The worker's side of forked stages: asks `service.stage_process.fork_server` to fork them.

Client and server are connected by a pair of sockets. The client sends arguments and variables of a
stage as JSON, together with the write ends of three pipes: standard output, standard error, and
status. On the latter the server sends the process id and, once the stage has ended, its exit code.
The server ends when the client closes its socket, and the stages end with the server.
"""

import errno
import json
import logging
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO

COMMAND = (sys.executable, "-m", "service.stage_process.command")
"""How the commands of stages begin; they can be forked."""

log = logging.getLogger("bitwright.forks")

NUMBER = struct.Struct("!i")
"""Format of the process id and the exit code."""

NO_PROCESS = 0
"""Sent by a server that could not fork, instead of a process id."""

_SERVER_ENDED = (errno.ECONNRESET, errno.EPIPE, errno.EBADF)
"""Errors of a channel whose server has ended; the last one if another server has replaced it."""


class ForkedProcess:
    """A process that the server has forked, with the part of `subprocess.Popen` that is needed."""

    def __init__(self, pid: int, stdout: int, stderr: int, status: int) -> None:
        """Take over the read ends of its pipes."""
        self.pid = pid
        self.stdout: IO[bytes] | None = os.fdopen(stdout, "rb", 0)
        self.stderr: IO[bytes] | None = os.fdopen(stderr, "rb", 0)
        self._status = os.fdopen(status, "rb", 0)
        self._code: int | None = None

    def poll(self) -> int | None:
        """Return its exit code, or minus the signal that ended it; None while it runs."""
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended and return its exit code, see `poll`.

        If the server has ended, the process was killed with it.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        if self._code is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._status, selectors.EVENT_READ)
                if not selector.select(timeout):
                    raise subprocess.TimeoutExpired(COMMAND, timeout or 0.0)
            code = _read_number(self._status.fileno())
            self._code = -signal.SIGKILL if code is None else code
            self._status.close()
        return self._code


class ForkClient:
    """Has stages forked by a server that has imported their libraries.

    The server is started when it is first needed, and again when it has ended.
    """

    def __init__(self) -> None:
        """Start nothing yet."""
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._lock = threading.Lock()

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> ForkedProcess:
        """Start a command that begins with `COMMAND`, in a session of its own.

        It gets the given variables and no others.

        Raises:
            OSError: it could not be started.
        """
        request = json.dumps(
            {"arguments": list(command[len(COMMAND) :]), "environment": dict(environment)}
        ).encode()
        for _ in range(2):  # the server may have ended since the last stage
            channel = self._connect(environment)
            try:
                return _ask(channel, request)
            except OSError as error:
                if error.errno not in _SERVER_ENDED:
                    raise
                log.warning("the process that forks stages has ended: %s", error)
                self._stop_server_of(channel)
        raise OSError("no process could be forked; see the log of the worker")

    def stop(self) -> None:
        """End the server, and with it all stages that it has forked."""
        if self._channel is not None:
            self._channel.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._channel = self._process = None

    def _stop_server_of(self, channel: socket.socket) -> None:
        """End the server of a channel, unless another one has replaced it."""
        with self._lock:
            if self._channel is channel:
                self.stop()

    def _connect(self, environment: Mapping[str, str]) -> socket.socket:
        """Return the socket to a running server; start one if there is none."""
        with self._lock:
            if self._channel is None or self._process is None or self._process.poll() is not None:
                self.stop()
                self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                command = [sys.executable, "-m", "service.stage_process.fork_server"]
                with theirs:
                    self._process = subprocess.Popen(  # noqa: S603  a list of arguments, no shell
                        command,
                        env=dict(environment),
                        stdin=theirs.fileno(),
                        stdout=subprocess.DEVNULL,
                    )
            return self._channel


def _ask(channel: socket.socket, request: bytes) -> ForkedProcess:
    """Return the process that the server has forked for a request.

    Raises:
        OSError: it cannot fork; or, with a number of `_SERVER_ENDED`, it has ended.
    """
    stdout, their_stdout = os.pipe()
    stderr, their_stderr = os.pipe()
    status, their_status = os.pipe()
    theirs = [their_stdout, their_stderr, their_status]
    pid = None
    try:
        socket.send_fds(channel, [request], theirs)
        close(*theirs)
        theirs = []
        pid = _read_number(status)
    finally:
        close(*theirs)
        if not pid:
            close(stdout, stderr, status)
    if pid is None:
        raise ConnectionResetError(errno.ECONNRESET, "the server ended before it answered")
    if pid == NO_PROCESS:
        raise OSError("no process could be forked; see the log of the worker")
    return ForkedProcess(pid, stdout, stderr, status)


def _read_number(descriptor: int) -> int | None:
    """Return the next number; None at the end of the pipe."""
    data = os.read(descriptor, NUMBER.size)  # a write of so few bytes is atomic
    return NUMBER.unpack(data)[0] if data else None


def close(*descriptors: int) -> None:
    """Close file descriptors."""
    for descriptor in descriptors:
        os.close(descriptor)
