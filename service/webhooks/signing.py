"""How webhooks are signed, and when they are sent again."""

import base64
import secrets
from collections.abc import Callable
from datetime import UTC, datetime

from standardwebhooks import Webhook

RETRY_SECONDS = (5, 30, 120, 600, 3_600, 10_800, 21_600, 28_800, 43_200)
"""Waits between attempts: 30 hours in all, and more than 24 when jitter shortens each."""

_JITTER = 0.2

_SECRET_BYTES = 32


def sign(secret: str, message_id: str, at: datetime, body: bytes) -> dict[str, str]:
    """Return the headers by which a receiver checks that a message is authentic and recent.

    Source: Standard Webhooks specification, section "Verifying webhook authenticity"; the symmetric
    scheme v1.

    Args:
        secret: of `new_secret`.
        message_id: the same for each attempt at one message.
        at: when this attempt is made, with its time zone.
        body: UTF-8.
    """
    moment = at.astimezone(UTC)  # the library ignores time zones
    signature = Webhook(secret).sign(message_id, moment, body.decode("utf-8"))
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(int(moment.timestamp())),
        "webhook-signature": signature,
    }


def new_secret() -> str:
    """Return a secret of 256 random bits, in the format of Standard Webhooks."""
    return "whsec_" + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode("ascii")


def delay_before(attempt: int, random: Callable[[], float]) -> float | None:
    """Return the seconds to wait before an attempt, 20 % more or less.

    Return None when there are no more attempts.

    Args:
        attempt: number of attempts before it; the first, 0, does not wait.
        random: returns numbers of [0, 1).
    """
    if attempt > len(RETRY_SECONDS):
        return None
    wait = RETRY_SECONDS[attempt - 1] if attempt > 0 else 0
    return wait * (1 - _JITTER + 2 * _JITTER * random())
