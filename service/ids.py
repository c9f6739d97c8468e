"""Names of things that the service makes."""

import secrets
import time


def new_id(kind: str) -> str:
    """Return a new id; ids of one kind sort by the time they were made."""
    return f"{kind}_{int(time.time() * 1e6):014x}{secrets.token_hex(6)}"
