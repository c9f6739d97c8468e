"""A process that has imported the libraries of stages, and forks itself for each stage.

So a stage starts in milliseconds instead of seconds. The command is
`python -m service.stage_process.fork_server`. Its standard input is the socket to the worker, see
`service.worker.fork_client`.

The forkserver of `multiprocessing` does not fit: it inherits all variables of the worker, secrets
included, whereas this process gets those of `service.process.stage_environment` only. It also
imports the worker's main module in each child, and hides errors of preloaded imports.
"""

import gc
import json
import os
import selectors
import shlex
import socket
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from setproctitle import getproctitle, setproctitle

from service.process import PARENT_VARIABLE, quiet_libraries
from service.stage_process import command
from service.worker.fork_client import COMMAND, NO_PROCESS, NUMBER, close

_LONGEST_REQUEST = 1_000_000


class ForkServer:
    """Forks for each request, and reports the exit code of each process."""

    def __init__(self, channel: socket.socket) -> None:
        """Serve the worker at the other end."""
        self._channel = channel
        self._selector = selectors.DefaultSelector()
        self._selector.register(channel, selectors.EVENT_READ)

    def serve(self) -> None:
        """Serve requests until the worker closes its end."""
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
        server = os.getpid()
        try:
            pid = os.fork()
        except OSError:  # too many processes, or no memory: other stages continue
            traceback.print_exc()
            _write_number(status, NO_PROCESS)
            close(stdout, stderr, status)
            return
        if pid == 0:
            self._forget()
            os.close(status)
            _become_stage(
                request["arguments"],
                {**request["environment"], PARENT_VARIABLE: str(server)},
                stdout,
                stderr,
            )
        close(stdout, stderr)
        _write_number(status, pid)
        self._selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, status))

    def _ended(self, watched: int, pid: int, status: int) -> None:
        self._selector.unregister(watched)
        _write_number(status, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        close(watched, status)

    def _forget(self) -> None:
        """Close the descriptors of the server and of other stages in a new process."""
        for key in list(self._selector.get_map().values()):
            close(key.fd, *(key.data or ())[1:])
        self._selector.close()


def _write_number(descriptor: int, number: int) -> None:
    with suppress(BrokenPipeError):  # the worker no longer waits for it
        os.write(descriptor, NUMBER.pack(number))


def _become_stage(
    arguments: Sequence[str], environment: Mapping[str, str], stdout: int, stderr: int
) -> NoReturn:
    """Run the command of a stage in the process that was forked for it, and end the process."""
    code = 1
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (stdout, 1), (stderr, 2)):
            os.dup2(source, target)
        close(nothing, stdout, stderr)
        os.environ.clear()
        os.environ.update(environment)
        setproctitle(shlex.join([*COMMAND, *arguments]))
        command.main(arguments)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001  this copy of the server must end
        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Import the libraries of stages, and serve until the worker ends."""
    quiet_libraries()
    from service import pipeline, single_stages  # noqa: F401, PLC0415  must follow the line above

    getproctitle()  # finds the title in memory before variables are moved
    gc.collect()
    gc.freeze()  # garbage collection in a fork would copy shared pages
    ForkServer(socket.socket(fileno=os.dup(0))).serve()


if __name__ == "__main__":
    main()
