"""Sends webhooks to checked addresses only.

They are signed by the Standard Webhooks scheme, and repeated for more than a day.

What is checked is what is connected to: a name is resolved once, every address of it is checked,
and the connection goes to one of these, so an answer that changes between check and connection (DNS
rebinding) reaches nothing.
"""

import socket
import ssl
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import httpcore2
import httpx2

from service.errors import DeliveryFailed
from service.webhooks.targets import _checked, _parse

_READ_BYTES = 8 * 1024
_ANSWER_BYTES = 64 * 1024


_BROKEN = (httpcore2.TimeoutException, httpcore2.NetworkError, httpcore2.ProtocolError)


def post(
    url: str,
    body: bytes,
    headers: Mapping[str, str],
    allowed: Sequence[str] = (),
    timeout_seconds: float = 10,
) -> int:
    """Send one POST and return the status of the answer, whatever it is.

    Redirects are not followed and proxies not used.

    At most 64 kB of the answer's body are read, and forgotten. A body that breaks off or comes too
    slowly changes nothing: the status has been given by then.

    Args:
        url: see `check_target`.
        body: sent as it is.
        headers: sent as they are; `Host` is that of the URL.
        allowed: see `check_target`.
        timeout_seconds: for everything together, from the name's resolution to the answer's last
            byte.

    Raises:
        TargetRefused: nothing may be sent there.
        DeliveryFailed: no status came in time. The message has nothing of the answer, and of the
            URL only the host.
    """
    deadline = _Deadline(time.monotonic() + timeout_seconds)
    target = _parse(url)
    sent = httpx2.Headers(dict(headers))
    sent["host"] = target.netloc.decode("ascii")
    to = httpcore2.URL(
        scheme=target.raw_scheme, host=target.raw_host, port=target.port, target=target.raw_path
    )
    try:
        with (
            httpcore2.ConnectionPool(network_backend=_CheckedBackend(allowed, deadline)) as pool,
            pool.stream("POST", to, headers=sent.raw, content=body) as answer,
        ):
            _drain(answer)
            return answer.status
    except _BROKEN as error:
        raise DeliveryFailed(
            _reason(target.host, error, timeout_seconds)
        ) from None  # h11 quotes the answer in its messages


@dataclass(frozen=True, slots=True)
class _Deadline:
    """When everything must be done, on the monotonic clock."""

    at_seconds: float

    def left(self) -> float:
        """Return the seconds that are left.

        Raises:
            TimeoutError: there are none.
        """
        left = self.at_seconds - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


class _CheckedBackend(httpcore2.NetworkBackend):
    """Connects to addresses that were checked, and to no others.

    Timeouts of single steps give way to the deadline.
    """

    def __init__(self, allowed: Sequence[str], deadline: _Deadline) -> None:
        self._allowed, self._deadline = allowed, deadline

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
        with _told_as(httpcore2.ConnectTimeout, httpcore2.ConnectError):
            endpoints = _checked(host, port, self._allowed, self._deadline.left())
            for index, (family, address) in enumerate(endpoints):
                connected = _connect(
                    family, address, self._deadline.left() / (len(endpoints) - index)
                )
                if connected is not None:
                    return _Stream(connected, self._deadline)
            self._deadline.left()
        raise httpcore2.ConnectError


def _connect(family: int, address: tuple[Any, ...], seconds: float) -> socket.socket | None:
    """Connect to an address, which is no name: nothing is resolved here."""
    connecting = socket.socket(family, socket.SOCK_STREAM)
    try:
        connecting.settimeout(seconds)
        connecting.connect(address)
        connecting.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError:
        connecting.close()
        return None
    return connecting


class _Stream(httpcore2.NetworkStream):
    """A connection whose steps share one deadline, so that slow receivers cannot hold it."""

    def __init__(self, connected: socket.socket, deadline: _Deadline) -> None:
        self._socket, self._deadline = connected, deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002
        with _told_as(httpcore2.ReadTimeout, httpcore2.ReadError):
            self._socket.settimeout(self._deadline.left())
            return self._socket.recv(min(max_bytes, _READ_BYTES))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ARG002
        with _told_as(httpcore2.WriteTimeout, httpcore2.WriteError):
            rest = memoryview(buffer)
            while rest:
                self._socket.settimeout(self._deadline.left())
                rest = rest[self._socket.send(rest) :]

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ARG002
    ) -> httpcore2.NetworkStream:
        try:
            with _told_as(httpcore2.ConnectTimeout, httpcore2.ConnectError):
                self._socket.settimeout(self._deadline.left())
                return _Stream(
                    ssl_context.wrap_socket(self._socket, server_hostname=server_hostname),
                    self._deadline,
                )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._socket.close()

    def get_extra_info(self, info: str) -> Any:
        return self._socket if info == "socket" else None


@contextmanager
def _told_as(late: type[Exception], broken: type[Exception]) -> Iterator[None]:
    """Tell errors of sockets as those that httpcore2 expects of a backend.

    Their argument is the error itself.
    """
    try:
        yield
    except TimeoutError as error:
        raise late(error) from error
    except OSError as error:
        raise broken(error) from error


def _drain(answer: httpcore2.Response) -> None:
    """Read so much of the body that a receiver can end a usual answer."""
    taken = 0
    with suppress(*_BROKEN):
        for part in answer.iter_stream():
            taken += len(part)
            if taken + _READ_BYTES > _ANSWER_BYTES:
                return


def _reason(host: str, error: Exception, timeout_seconds: float) -> str:
    if isinstance(error, httpcore2.TimeoutException):
        return f"host {host!r} gave no answer within {timeout_seconds:g} s"
    behind = error.args[0] if error.args else None  # the connection pool takes away the cause
    if isinstance(behind, ssl.SSLCertVerificationError):
        return (
            f"host {host!r} has no TLS certificate that is valid and trusted; renew it, or have "
            "its authority trusted"
        )
    if isinstance(behind, ssl.SSLError):
        return f"host {host!r} did not agree on TLS"
    if isinstance(error, httpcore2.ConnectError):
        return f"host {host!r} was not found or did not take the connection"
    if isinstance(error, httpcore2.ProtocolError):
        return f"host {host!r} did not answer in HTTP"
    return f"host {host!r} closed the connection without an answer"
