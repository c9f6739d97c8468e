"""Connections to checked addresses, all within one deadline."""

import socket
import ssl
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpcore2

from service.webhooks.targets import checked_endpoints

READ_BYTES = 8 * 1024
"""Most bytes of one read."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """When everything must be done, on the monotonic clock."""

    at_seconds: float

    @classmethod
    def after(cls, seconds: float) -> "Deadline":
        """Return the deadline that many seconds from now."""
        return cls(time.monotonic() + seconds)

    def seconds_left(self) -> float:
        """Return the seconds that are left.

        Raises:
            TimeoutError: there are none.
        """
        left = self.at_seconds - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


class CheckedNetwork(httpcore2.NetworkBackend):
    """Connects to addresses that were checked, and to no others.

    The deadline replaces the timeouts of single steps.
    """

    def __init__(self, allowed: Sequence[str], deadline: Deadline) -> None:
        """Use an allow-list, see `service.webhooks.targets.check_target`, and a deadline."""
        self._allowed = allowed
        self._deadline = deadline

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ARG002  the deadline counts
        local_address: str | None = None,  # noqa: ARG002
        socket_options: Iterable[Any] | None = None,  # noqa: ARG002
    ) -> httpcore2.NetworkStream:
        """Resolve, check, connect.

        Several addresses are tried one by one, each for its share of the time.

        Raises:
            TargetRefused: the host has an address that may not be connected to.
            httpcore2.ConnectError: none answers.
        """
        with _translated(httpcore2.ConnectTimeout, httpcore2.ConnectError):
            left = self._deadline.seconds_left()
            endpoints = checked_endpoints(host, port, self._allowed, left)
            for index, (family, address) in enumerate(endpoints):
                share = self._deadline.seconds_left() / (len(endpoints) - index)
                connection = _connect(family, address, share)
                if connection is not None:
                    return _Stream(connection, self._deadline)
            self._deadline.seconds_left()
        raise httpcore2.ConnectError


def _connect(family: int, address: tuple[Any, ...], seconds: float) -> socket.socket | None:
    """Connect to an address, which is not a name: nothing is resolved here."""
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        connection.settimeout(seconds)
        connection.connect(address)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError:
        connection.close()
        return None
    return connection


class _Stream(httpcore2.NetworkStream):
    """A connection whose every step has the time that is left.

    So a slow receiver cannot hold it for longer.
    """

    def __init__(self, connection: socket.socket, deadline: Deadline) -> None:
        self._socket = connection
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002
        with _translated(httpcore2.ReadTimeout, httpcore2.ReadError):
            self._socket.settimeout(self._deadline.seconds_left())
            return self._socket.recv(min(max_bytes, READ_BYTES))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ARG002
        with _translated(httpcore2.WriteTimeout, httpcore2.WriteError):
            rest = memoryview(buffer)
            while rest:
                self._socket.settimeout(self._deadline.seconds_left())
                rest = rest[self._socket.send(rest) :]

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ARG002
    ) -> httpcore2.NetworkStream:
        try:
            with _translated(httpcore2.ConnectTimeout, httpcore2.ConnectError):
                self._socket.settimeout(self._deadline.seconds_left())
                encrypted = ssl_context.wrap_socket(self._socket, server_hostname=server_hostname)
                return _Stream(encrypted, self._deadline)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._socket.close()

    def get_extra_info(self, info: str) -> Any:
        return self._socket if info == "socket" else None


@contextmanager
def _translated(late: type[Exception], broken: type[Exception]) -> Iterator[None]:
    """Raise errors of sockets as those that httpcore2 expects of a network.

    Their argument is the original error.
    """
    try:
        yield
    except TimeoutError as error:
        raise late(error) from error
    except OSError as error:
        raise broken(error) from error
