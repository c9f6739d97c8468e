"""Reads what a process writes, line by line, while it runs."""

import os
import selectors
import subprocess
from typing import Any

from service.worker.fork_client import ForkedProcess

Process = subprocess.Popen[bytes] | ForkedProcess

TICK_SECONDS = 0.25
"""How long a read waits for output."""

_MAX_LINE_BYTES = 1_000_000
_READ_BYTES = 65536


class StreamReader:
    """Reads standard output and standard error of a process, without blocking on either."""

    def __init__(self, process: Process) -> None:
        """Read the streams of `process`."""
        self._process = process
        self._selector = selectors.DefaultSelector()
        self._lines: dict[Any, _LineBuffer] = {}
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                self._lines[stream] = _LineBuffer()
                self._selector.register(stream, selectors.EVENT_READ)

    def read(self) -> tuple[list[str], list[str]]:
        """Return new lines of standard output and of standard error.

        Wait at most `TICK_SECONDS` for some.
        """
        output: list[str] = []
        errors: list[str] = []
        for key, _ in self._selector.select(TICK_SECONDS):
            stream: Any = key.fileobj
            data = os.read(key.fd, _READ_BYTES)
            if not data:
                self._selector.unregister(stream)
            lines = errors if stream is self._process.stderr else output
            lines.extend(self._lines[stream].feed(data or b"\n"))
        return output, errors

    @property
    def is_done(self) -> bool:
        """Whether the process has ended and nothing more can be read.

        Processes that it started may still hold the streams open.
        """
        if not self._selector.get_map():
            return True
        return self._process.poll() is not None and not self._selector.select(TICK_SECONDS)


class _LineBuffer:
    """Cuts the bytes of a stream into lines."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        """Return the lines that `data` completes, without empty ones.

        Bytes that are not UTF-8 are replaced, as are zero bytes, which PostgreSQL does not store.
        """
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _MAX_LINE_BYTES:
            lines.append(self._rest[:_MAX_LINE_BYTES])
            self._rest = b""
        return [
            line.decode("utf-8", "replace").replace("\0", "\ufffd")
            for line in lines
            if line.strip()
        ]
