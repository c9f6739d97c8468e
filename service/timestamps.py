"""Times as they go over the wire."""

from datetime import UTC, datetime


def rfc3339(seconds: float) -> str:
    """Return a time in RFC 3339, in UTC and to the millisecond.

    Args:
        seconds: since 1970, UTC.
    """
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def rfc3339_or_none(seconds: float | None) -> str | None:
    """Return a time in RFC 3339 as `rfc3339` does; None for None."""
    return None if seconds is None else rfc3339(seconds)
