"""Which URLs a webhook may be sent to, and the addresses behind them."""

import re
import socket
from collections.abc import Sequence
from contextlib import suppress
from ipaddress import ip_address
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import httpx2

from service.errors import TargetRefused
from service.webhooks.addresses import may_reach, networks_of

_RESOLVE_SECONDS = 5.0
_WEB_PORTS = (80, 443)
_OPEN_PORTS = range(1024, 65536)

_MAX_HOST_CHARACTERS = 253
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_HOST = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_NUMERIC = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)")
_PRIVATE_NAME = re.compile(r"(?:.*\.)?(?:localhost|internal|local|home\.arpa)")

Endpoint = tuple[int, tuple[Any, ...]]
"""Family and address as `socket` takes them."""


def check_target(url: str, allowed: Sequence[str] = ()) -> None:
    """Check that a webhook may be sent to a URL. Its name is resolved, but nothing is connected.

    Args:
        url: https or http, on port 443, 80 or from 1024, without user name, its host in ASCII and
            public.
        allowed: what may be private: networks such as "10.0.0.0/8", addresses, and exact host
            names.

    Raises:
        TargetRefused: nothing may be sent there. The message is the same for a host that is unknown
            and one that is private.
    """
    target = parse_target(url)
    if not checked_endpoints(target.host, _port(target), allowed, _RESOLVE_SECONDS):
        raise _not_public(target.host)


def parse_target(url: str) -> httpx2.URL:
    """Return a URL whose syntax is allowed.

    What is checked and what is connected to come from this one parser.

    Raises:
        TargetRefused: the URL is not allowed.
    """
    parsed = _parse(url)
    if parsed.scheme not in ("https", "http"):
        raise TargetRefused(
            f"scheme {parsed.scheme[:20]!r} is not supported; give an https or http address"
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
    port = _port(parsed)
    if port not in _WEB_PORTS and port not in _OPEN_PORTS:
        raise TargetRefused(
            f"port {port} is not allowed; use 443, 80, or one of {_OPEN_PORTS.start} to "
            f"{_OPEN_PORTS.stop - 1}"
        )
    return parsed


def _parse(url: str) -> httpx2.URL:
    if url.isascii() and url.isprintable() and not {" ", "\\"} & set(url):
        with suppress(httpx2.InvalidURL):
            return httpx2.URL(url)
    raise TargetRefused(
        "the webhook's address cannot be read; give a URL in plain ASCII such as "
        "https://example.com/hooks"
    )


def _port(url: httpx2.URL) -> int:
    if url.port is not None:
        return url.port
    return 443 if url.scheme == "https" else 80


def _is_plain(host: str) -> bool:
    """Return whether a host is written so that every resolver reads the same.

    It is not if it is written like 127.1, 0x7f000001 or 0177.0.0.1.
    """
    if ":" in host or _NUMERIC.fullmatch(host):
        with suppress(ValueError):
            return bool(ip_address(host)) and "%" not in host
        return False
    return len(host) <= _MAX_HOST_CHARACTERS and _HOST.fullmatch(host) is not None


def _not_public(host: str) -> TargetRefused:
    return TargetRefused(
        f"host {host[:100]!r} is unknown or not public; use a public one, or have the operator "
        "add it to BITWRIGHT_WEBHOOK_TARGETS"
    )


def checked_endpoints(
    host: str, port: int, allowed: Sequence[str], seconds: float
) -> list[Endpoint]:
    """Resolve a host once and return its addresses, all of which may be connected to.

    Return an empty list for an unknown host.

    Raises:
        TargetRefused: one of them may not be connected to.
    """
    endpoints = _resolve(host, port, seconds)
    entries = [entry.strip().lower() for entry in allowed]
    if host in entries:
        return endpoints
    networks = networks_of(entries)
    is_private_name = _PRIVATE_NAME.fullmatch(host) is not None
    for _, (literal, *_) in endpoints:
        if not may_reach(literal, networks, is_private_name=is_private_name):
            raise _not_public(host)
    return endpoints


def _resolve(host: str, port: int, seconds: float) -> list[Endpoint]:
    """Return the addresses of a host; none if it is unknown, or if no answer comes in time.

    The system's resolver has no timeout, so it is called in a thread that may be left behind.
    """
    answers: SimpleQueue[list[Endpoint]] = SimpleQueue()

    def ask() -> None:
        endpoints: list[Endpoint] = []
        with suppress(OSError, UnicodeError):
            answer = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
            )
            endpoints = [(family, address) for family, _, _, _, address in answer]
        answers.put(endpoints)

    Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=max(seconds, 0))
    except Empty:
        return []
