"""Which addresses a webhook may reach: public ones only."""

import re
import socket
from collections.abc import Iterable, Sequence
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import httpx2

from service.errors import TargetRefused

_RESOLVE_SECONDS = 5.0

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
