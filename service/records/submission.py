"""A job as a tenant submits it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PRIORITIES = {"high": 10, "normal": 20, "low": 30}
"""Priorities by name; lower numbers run first."""


@dataclass(frozen=True, slots=True)
class Submission:
    """What a tenant asks for.

    Attributes:
        tenant: who asks.
        request: the job's options, as JSON values.
        name: what the tenant calls the job.
        labels: to find it by.
        priority: one of `PRIORITIES`.
        key: idempotency key; another submission with the same key returns the first one's job.
        profile: digest of a profile to use instead of measuring one.
        parent: the job that this one was forked from.
        first_stage: where it starts; None for the first stage.
    """

    tenant: str
    request: Mapping[str, Any]
    name: str = ""
    labels: Mapping[str, str] | None = None
    priority: str = "normal"
    key: str | None = None
    profile: str | None = None
    parent: str | None = None
    first_stage: str | None = None

    @property
    def body_sha256(self) -> str:
        """Hash of everything that decides the job."""
        body: dict[str, Any] = {
            "request": dict(self.request),
            "name": self.name,
            "labels": dict(self.labels or {}),
            "priority": self.priority,
            "profile": self.profile,
            "parent": self.parent,
            "first_stage": self.first_stage,
        }
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
