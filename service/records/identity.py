"""Who sends a request, and what they may do."""

from dataclasses import dataclass

MAX_TENANT_CHARACTERS = 80

SCOPES = {
    "jobs:read": "see jobs, their events, logs and artifacts",
    "jobs:write": "submit, cancel, retry and delete jobs",
    "profiles:read": "see and export profiles",
    "profiles:write": "import and delete profiles",
    "allocations:solve": "ask what-ifs",
    "webhooks:write": "see, register and remove webhooks",
    "metrics:read": "read metrics",
}
"""What a caller may be allowed to do."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sends a request.

    Attributes:
        tenant: whose jobs and profiles are theirs.
        scopes: what they may do, of `SCOPES`.
    """

    tenant: str
    scopes: frozenset[str]


LOCAL = Caller("local", frozenset(SCOPES))
"""Caller of a service that only this machine can reach, and that asks for no keys."""
