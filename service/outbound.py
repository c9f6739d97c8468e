"""Sends webhooks: to checked addresses only, signed by the Standard Webhooks scheme, tried again for a day and more.

What is checked is what is connected to: a name is resolved once, every address of it is checked,
and the connection goes to one of these, so an answer that changes between check and connection (DNS
rebinding) reaches nothing.
"""

import base64
import re
import secrets
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import httpcore2
import httpx2
from standardwebhooks import Webhook

from service.errors import DeliveryFailed, TargetRefused

RETRY_SECONDS = (5, 30, 120, 600, 3_600, 10_800, 21_600, 28_800, 43_200)
"""Waits between attempts: 30 hours in all, and more than 24 when jitter shortens each."""

_JITTER = 0.2
_SECRET_BYTES = 32
_RESOLVE_SECONDS = 5.0
_READ_BYTES = 8 * 1024
_ANSWER_BYTES = 64 * 1024

_WEB_PORTS = (80, 443)
_OPEN_PORTS = range(1024, 65536)
_LONGEST_HOST = 253
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_HOST = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_NUMERIC = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)")
_PRIVATE_NAME = re.compile(r"(?:.*\.)?(?:localhost|internal|local|home\.arpa)")

_NAT64 = ip_network("64:ff9b::/96")
_UNICAST = ip_network("2000::/3")
_NOT_PUBLIC = tuple(ip_network(text) for text in ("192.0.0.0/24", "192.88.99.0/24", "3fff::/20"))
"""Special networks that some versions of `ipaddress` hold for global."""

_BROKEN = (httpcore2.TimeoutException, httpcore2.NetworkError, httpcore2.ProtocolError)

_Address = IPv4Address | IPv6Address
_Endpoint = tuple[int, tuple[Any, ...]]
"""Family and address as `socket` takes them."""


def check_target(url: str, allowed: Sequence[str] = ()) -> None:
    """Check that a webhook may be sent to a URL; nothing is connected to.

    Args:
        url: https or http, on port 443, 80 or from 1024, without user name, its host in ASCII and
            public.
        allowed: what may be private: networks such as "10.0.0.0/8", addresses, and exact host
            names.

    Raises:
        TargetRefused: it may not. The message is the same for a host that is unknown and one that
            is private.
    """
    target = _parse(url)
    if not _checked(target.host, _port(target), allowed, _RESOLVE_SECONDS):
        raise _not_public(target.host)


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


def sign(secret: str, message_id: str, at: datetime, body: bytes) -> dict[str, str]:
    """Return the headers by which a receiver checks that a message is ours and new.

    Source: Standard Webhooks specification, section "Verifying webhook authenticity"; the symmetric
    scheme v1.

    Args:
        secret: of `new_secret`.
        message_id: the same for each attempt at one message.
        at: when this attempt is made, with its time zone.
        body: UTF-8.
    """
    moment = at.astimezone(UTC)  # the library takes any time for UTC
    signature = Webhook(secret).sign(message_id, moment, body.decode("utf-8"))
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(int(moment.timestamp())),
        "webhook-signature": signature,
    }


def new_secret() -> str:
    """Return a secret of 256 random bits, as receivers' libraries take it."""
    return "whsec_" + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode("ascii")


def delay_before(attempt: int, random: Callable[[], float]) -> float | None:
    """Return the seconds to wait before an attempt, 20 % more or less.

    None when there are no more attempts.

    Args:
        attempt: how many were made before it; the first, 0, waits for nothing.
        random: gives numbers of [0, 1).
    """
    if attempt > len(RETRY_SECONDS):
        return None
    wait = RETRY_SECONDS[attempt - 1] if attempt > 0 else 0
    return wait * (1 - _JITTER + 2 * _JITTER * random())


def _parse(url: str) -> httpx2.URL:
    """Return a URL whose syntax is allowed.

    The one parser decides what is checked and what is connected to.
    """
    try:
        parsed = (
            httpx2.URL(url)
            if url.isascii() and url.isprintable() and not {" ", "\\"} & set(url)
            else None
        )
    except httpx2.InvalidURL:
        parsed = None
    if parsed is None:
        raise TargetRefused(
            "the webhook's address cannot be read; give a URL in plain ASCII such as "
            "https://example.com/hooks"
        )
    if parsed.scheme not in ("https", "http"):
        raise TargetRefused(
            f"scheme {parsed.scheme[:20]!r} is not sent to; give an https or http address"
        )
    if parsed.userinfo:
        raise TargetRefused(
            "the webhook's address holds a user name or password; leave it out, messages are "
            "signed instead"
        )
    if not _is_plain(parsed.host):
        raise TargetRefused(
            f"host {parsed.host[:100]!r} is neither a host name nor an IP address written out; "
            "give one of them"
        )
    if (port := _port(parsed)) not in _WEB_PORTS and port not in _OPEN_PORTS:
        raise TargetRefused(
            f"port {port} is not sent to; use 443, 80, or one of {_OPEN_PORTS.start} to "
            f"{_OPEN_PORTS.stop - 1}"
        )
    return parsed


def _port(url: httpx2.URL) -> int:
    return url.port if url.port is not None else 443 if url.scheme == "https" else 80


def _is_plain(host: str) -> bool:
    """Return whether a host is written so that every resolver reads the same.

    Not 127.1, 0x7f000001 or 0177.0.0.1.
    """
    if ":" in host or _NUMERIC.fullmatch(host):
        with suppress(ValueError):
            return bool(ip_address(host)) and "%" not in host
        return False
    return len(host) <= _LONGEST_HOST and _HOST.fullmatch(host) is not None


def _not_public(host: str) -> TargetRefused:
    return TargetRefused(
        f"host {host[:100]!r} is unknown or not public; use a public one, or have the operator "
        "add it to BITWRIGHT_WEBHOOK_TARGETS"
    )


def _checked(host: str, port: int, allowed: Sequence[str], seconds: float) -> list[_Endpoint]:
    """Resolve a host once and return its addresses, all of which may be connected to.

    None where it is unknown.

    Raises:
        TargetRefused: one of them may not.
    """
    endpoints = _resolve(host, port, seconds)
    entries = [entry.strip().lower() for entry in allowed]
    if host in entries:
        return endpoints
    networks = _networks(entries)
    is_private_name = _PRIVATE_NAME.fullmatch(host) is not None
    for _, (literal, *_) in endpoints:
        address = ip_address(literal)
        ends = (address,) if _lies_in(address, networks) else _ends(address)
        if not all(
            _lies_in(end, networks) or (_is_public(end) and not is_private_name) for end in ends
        ):
            raise _not_public(host)
    return endpoints


def _resolve(host: str, port: int, seconds: float) -> list[_Endpoint]:
    """Ask the system's resolver, which knows no deadline, in a thread that may be left behind."""
    answers: SimpleQueue[list[_Endpoint]] = SimpleQueue()

    def ask() -> None:
        found: list[_Endpoint] = []
        with suppress(OSError, UnicodeError):
            answer = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
            )
            found = [(family, address) for family, _, _, _, address in answer]
        answers.put(found)

    Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=max(seconds, 0))
    except Empty:
        return []


def _networks(entries: Iterable[str]) -> list[IPv4Network | IPv6Network]:
    networks = []
    for entry in entries:
        with suppress(ValueError):  # then it is a host name
            networks.append(ip_network(entry, strict=False))
    return networks


def _lies_in(address: _Address, networks: Iterable[IPv4Network | IPv6Network]) -> bool:
    return any(address in network for network in networks)


def _ends(address: _Address) -> tuple[_Address, ...]:
    """Return where packets to an address may go.

    To the IPv4 addresses that it carries, or else to itself.
    """
    if isinstance(address, IPv4Address):
        return (address,)
    if address in _NAT64:
        return (IPv4Address(int(address) & 0xFFFFFFFF),)
    carried = address.ipv4_mapped or address.sixtofour
    return (carried,) if carried is not None else address.teredo or (address,)


def _is_public(address: _Address) -> bool:
    if not address.is_global or address.is_multicast or _lies_in(address, _NOT_PUBLIC):
        return False
    return isinstance(address, IPv4Address) or address in _UNICAST


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
    """A connection, each of whose steps has the time that is left, so that a slow receiver cannot hold it for longer."""

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
