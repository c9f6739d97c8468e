"""Ids of jobs, keys, webhooks and the like."""

import re
import secrets
import time

_ID = re.compile(r"[a-z]+_[0-9a-f]{26}")


def new_id(kind: str) -> str:
    """Return a new id. Ids of one kind sort by the time they were created."""
    return f"{kind}_{int(time.time() * 1e6):014x}{secrets.token_hex(6)}"


def is_id(text: str) -> bool:
    """Return whether a text could be an id.

    Other texts are not looked up at all: PostgreSQL accepts no zero bytes.
    """
    return _ID.fullmatch(text) is not None
