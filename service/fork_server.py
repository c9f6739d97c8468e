"""A process that has imported what stages need, and forks itself for each: a stage starts in milliseconds instead of seconds.

`ForkServer` is the worker's side of it; `python -m service.fork_server` the other. They speak over a pair of sockets: the worker
sends the arguments and variables of a stage as JSON, together with the ends of three pipes: standard output, standard error, and
one that the process id comes back on and, once the stage has ended, its exit code. The server ends when the worker's end of the
pair closes, and its stages end with it.
"""

import gc
import json
import os
import selectors
import shlex
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from select import select
from typing import IO, Any, NoReturn

from setproctitle import getproctitle, setproctitle

from service import stage
from service.settings import PARENT_VARIABLE, quiet_libraries

COMMAND = (sys.executable, "-m", "service.stage")
"""Commands that begin like this can be forked."""

_NUMBER = struct.Struct("!i")
_LONGEST_REQUEST = 1_000_000


class ForkedProcess:
    """A process that the fork server has started: as much of `subprocess.Popen` as a runner needs."""

    def __init__(self, pid: int, stdout: int, stderr: int, status: int) -> None:
        """Hold the ends of its pipes."""
        self.pid = pid
        self.stdout: IO[bytes] | None = os.fdopen(stdout, "rb", 0)
        self.stderr: IO[bytes] | None = os.fdopen(stderr, "rb", 0)
        self._status = os.fdopen(status, "rb", 0)
        self._code: int | None = None

    def poll(self) -> int | None:
        """Return its exit code, minus the signal that ended it; None while it runs."""
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended and return its exit code; that of a kill if its server has ended, and it therefore too.

        Raises:
            subprocess.TimeoutExpired: it runs still.
        """
        if self._code is None:
            if not select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(COMMAND, timeout or 0.0)
            code = _read_number(self._status.fileno())
            self._code = -signal.SIGKILL if code is None else code
            self._status.close()
        return self._code


class ForkServer:
    """Starts stages by forking a process that has imported their libraries; is started itself when it is first needed."""

    def __init__(self) -> None:
        """Start nothing yet."""
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._lock = threading.Lock()

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> ForkedProcess:
        """Start a command that begins with `COMMAND`, in a session of its own, with the variables given and no others.

        Raises:
            OSError: it could not be started, as the server ended.
        """
        request = json.dumps({"arguments": list(command[len(COMMAND) :]), "environment": dict(environment)}).encode()
        (stdout, their_stdout), (stderr, their_stderr), (status, their_status) = os.pipe(), os.pipe(), os.pipe()
        theirs = [their_stdout, their_stderr, their_status]
        try:
            socket.send_fds(self._connect(environment), [request], theirs)
        except OSError:
            _close(stdout, stderr, status)
            raise
        finally:
            _close(*theirs)
        pid = _read_number(status)
        if pid is None:
            _close(stdout, stderr, status)
            raise OSError("the process that forks stages has ended; its messages are in the log of the worker")
        return ForkedProcess(pid, stdout, stderr, status)

    def stop(self) -> None:
        """End the server, and with it all that it has started."""
        if self._channel is not None:
            self._channel.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._channel = self._process = None

    def _connect(self, environment: Mapping[str, str]) -> socket.socket:
        """Return the socket to a server that runs."""
        with self._lock:
            if self._channel is None or self._process is None or self._process.poll() is not None:
                self.stop()
                self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                command = [sys.executable, "-m", "service.fork_server"]
                with theirs:
                    self._process = subprocess.Popen(  # noqa: S603  a list of arguments, no shell
                        command, env=dict(environment), stdin=theirs.fileno(), stdout=subprocess.DEVNULL
                    )
            return self._channel


def _read_number(descriptor: int) -> int | None:
    """Return the next number, None at the end."""
    data = os.read(descriptor, _NUMBER.size)  # so few bytes are written at once
    return _NUMBER.unpack(data)[0] if data else None


def _write_number(descriptor: int, number: int) -> None:
    with suppress(BrokenPipeError):  # nobody asks any more
        os.write(descriptor, _NUMBER.pack(number))


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


class _Forking:
    """The other side: forks for each request, and tells of each process that has ended."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel, self._selector = channel, selectors.DefaultSelector()
        self._selector.register(channel, selectors.EVENT_READ)

    def serve(self) -> None:
        """Go on until the worker has closed its end."""
        while True:
            for key, _ in self._selector.select():
                if key.data is not None:
                    self._ended(key.fd, *key.data)
                    continue
                request, descriptors, _, _ = socket.recv_fds(self._channel, _LONGEST_REQUEST, 3)
                if not request:
                    return
                self._begin(json.loads(request), *descriptors)

    def _begin(self, request: Mapping[str, Any], stdout: int, stderr: int, status: int) -> None:
        server, pid = os.getpid(), os.fork()
        if pid == 0:
            self._forget()
            os.close(status)
            _become_stage(request["arguments"], {**request["environment"], PARENT_VARIABLE: str(server)}, stdout, stderr)
        _close(stdout, stderr)
        _write_number(status, pid)
        self._selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, status))

    def _ended(self, watched: int, pid: int, status: int) -> None:
        self._selector.unregister(watched)
        _write_number(status, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        _close(watched, status)

    def _forget(self) -> None:
        """Close, in a new process, what belongs to the server and to other stages."""
        for key in list(self._selector.get_map().values()):
            _close(key.fd, *(key.data or ())[1:])
        self._selector.close()


def _become_stage(arguments: Sequence[str], environment: Mapping[str, str], stdout: int, stderr: int) -> NoReturn:
    """Do what the command does, in the process that was forked for it, and end."""
    code = 1
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (stdout, 1), (stderr, 2)):
            os.dup2(source, target)
        _close(nothing, stdout, stderr)
        os.environ.clear()
        os.environ.update(environment)
        setproctitle(shlex.join([*COMMAND, *arguments]))
        stage.main(arguments)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001  nothing may go on in this copy of the server
        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Import what stages need; then fork a stage for each request until the worker is gone."""
    quiet_libraries()
    from service import estimate, pipeline  # noqa: F401, PLC0415  takes seconds, and comes after the line above

    getproctitle()  # finds where the title lies while the variables are where they were
    gc.collect()
    gc.freeze()  # collecting garbage in a fork would copy what they share
    _Forking(socket.socket(fileno=os.dup(0))).serve()


if __name__ == "__main__":
    main()
