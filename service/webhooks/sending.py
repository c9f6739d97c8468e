"""Sends webhooks, to checked addresses only.

A name is resolved once, every address of it is checked, and the connection goes to one of these. So
an answer of the resolver that changes between check and connection (DNS rebinding) reaches nothing.
"""

import ssl
from collections.abc import Mapping, Sequence
from contextlib import suppress

import httpcore2
import httpx2

from service.errors import DeliveryFailed
from service.webhooks.checked_network import READ_BYTES, CheckedNetwork, Deadline
from service.webhooks.targets import parse_target

_ANSWER_BYTES = 64 * 1024

_FAULTS = (httpcore2.TimeoutException, httpcore2.NetworkError, httpcore2.ProtocolError)


def post(
    url: str,
    body: bytes,
    headers: Mapping[str, str],
    allowed: Sequence[str] = (),
    timeout_seconds: float = 10,
) -> int:
    """Send one POST and return the status of the answer, whatever it is.

    Redirects are not followed, and proxies are not used. At most 64 kB of the answer's body are
    read, and discarded. A body that breaks off or comes too slowly changes nothing: the status is
    known by then.

    Args:
        url: see `service.webhooks.targets.check_target`.
        body: sent as it is.
        headers: sent as they are; `Host` is that of the URL.
        allowed: see `service.webhooks.targets.check_target`.
        timeout_seconds: for everything together, from the resolution of the name to the last byte
            of the answer.

    Raises:
        TargetRefused: nothing may be sent there.
        DeliveryFailed: no status came in time. The message has nothing of the answer, and of the
            URL only the host.
    """
    target = parse_target(url)
    network = CheckedNetwork(allowed, Deadline.after(timeout_seconds))
    sent = httpx2.Headers(dict(headers))
    sent["host"] = target.netloc.decode("ascii")
    to = httpcore2.URL(
        scheme=target.raw_scheme, host=target.raw_host, port=target.port, target=target.raw_path
    )
    try:
        with (
            httpcore2.ConnectionPool(network_backend=network) as pool,
            pool.stream("POST", to, headers=sent.raw, content=body) as answer,
        ):
            _drain(answer)
            return answer.status
    except _FAULTS as error:
        reason = _reason(target.host, error, timeout_seconds)
        raise DeliveryFailed(reason) from None  # h11 quotes the answer in its messages


def _drain(answer: httpcore2.Response) -> None:
    """Read enough of the body that a receiver can finish an ordinary answer."""
    received = 0
    with suppress(*_FAULTS):
        for part in answer.iter_stream():
            received += len(part)
            if received + READ_BYTES > _ANSWER_BYTES:
                return


def _reason(host: str, error: Exception, timeout_seconds: float) -> str:
    """Return why no status came."""
    if isinstance(error, httpcore2.TimeoutException):
        return f"host {host!r} gave no answer within {timeout_seconds:g} s"
    original = error.args[0] if error.args else None  # the connection pool removes the cause
    if isinstance(original, ssl.SSLCertVerificationError):
        return (
            f"host {host!r} has no TLS certificate that is valid and trusted; renew it, or have "
            "its authority trusted"
        )
    if isinstance(original, ssl.SSLError):
        return f"host {host!r} did not agree on TLS"
    if isinstance(error, httpcore2.ConnectError):
        return f"host {host!r} was not found or did not accept the connection"
    if isinstance(error, httpcore2.ProtocolError):
        return f"host {host!r} did not answer in HTTP"
    return f"host {host!r} closed the connection without an answer"
