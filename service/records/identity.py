"""Who sends a request, and what they may do: API keys, and tokens of an OpenID Connect provider."""

import hashlib
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx2
import jwt
import sqlalchemy as sa

from service.errors import NoCredentials, RequestError
from service.ids import new_id
from service.records.database import api_keys

SCOPES = {
    "jobs:read": "see jobs, their events, logs and artifacts",
    "jobs:write": "submit, cancel, retry and delete jobs",
    "profiles:read": "see and export profiles",
    "profiles:write": "import and delete profiles",
    "allocations:solve": "ask what-ifs",
    "webhooks:write": "see, register and remove webhooks",
    "metrics:read": "read metrics",
}

_PREFIX = "bw_"
_KEY_BYTES = 32
_DAY_SECONDS = 86400.0
_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "ES256", "ES384", "EdDSA")
_LEEWAY_SECONDS = 30
_LONGEST = 80


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
"""Whoever sends a request to a service that only this machine can reach, and that asks for no keys."""


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """What is known of an API key; the key itself is not kept, only its hash."""

    id: str
    tenant: str
    name: str
    scopes: tuple[str, ...]
    created_at: float
    expires_at: float | None
    revoked_at: float | None


class Keys:
    """API keys in the database, as hashes.

    A key is 256 random bits, so a plain hash is not to be guessed.
    """

    def __init__(self, engine: sa.Engine) -> None:
        """Use the tables behind `engine`."""
        self._engine = engine

    def create(
        self, tenant: str, name: str, scopes: Sequence[str], days: float | None = None
    ) -> tuple[KeyInfo, str]:
        """Make a key; return what is known of it, and the key, which is not to be had again.

        Raises:
            RequestError: a scope does not exist, or the tenant's name is too long or empty.
        """
        unknown = [scope for scope in scopes if scope not in SCOPES]
        if unknown or not scopes:
            raise RequestError(
                f"scope {unknown[0] if unknown else ''!r} does not exist; use some of "
                f"{', '.join(SCOPES)}"
            )
        if not 0 < len(tenant) <= _LONGEST or not tenant.isprintable():
            raise RequestError(
                f"tenant {tenant[:100]!r}: give a name of 1 to {_LONGEST} characters"
            )
        key, now = _PREFIX + secrets.token_urlsafe(_KEY_BYTES), time.time()
        expires = None if days is None else now + days * _DAY_SECONDS
        info = KeyInfo(new_id("key"), tenant, name, tuple(scopes), now, expires, None)
        values = {
            "id": info.id,
            "tenant": tenant,
            "name": name,
            "scopes": list(scopes),
            "created_at": now,
            "expires_at": expires,
        }
        with self._engine.begin() as connection:
            connection.execute(sa.insert(api_keys).values(**values, sha256=_hash(key)))
        return info, key

    def all(self) -> list[KeyInfo]:
        """Return what is known of all keys, the oldest first."""
        with self._engine.connect() as connection:
            return [
                _info(row)
                for row in connection.execute(sa.select(api_keys).order_by(api_keys.c.id))
            ]

    def revoke(self, key_id: str) -> None:
        """Take a key out of use, for good.

        Raises:
            RequestError: there is no such key in use.
        """
        with self._engine.begin() as connection:
            mine = api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None)
            if not connection.execute(
                sa.update(api_keys).where(*mine).values(revoked_at=time.time())
            ).rowcount:
                raise RequestError(f"there is no key {key_id!r} in use; list them")

    def caller(self, key: str) -> Caller:
        """Return who a key belongs to.

        Raises:
            NoCredentials: it is unknown, revoked or expired.
        """
        with self._engine.connect() as connection:
            row = connection.execute(
                sa.select(api_keys).where(api_keys.c.sha256 == _hash(key))
            ).one_or_none()
        if (
            row is None
            or row.revoked_at is not None
            or (row.expires_at is not None and row.expires_at < time.time())
        ):
            raise NoCredentials("the API key is unknown, revoked or expired")
        return Caller(row.tenant, frozenset(row.scopes))


class Tokens:
    """Tokens of one OpenID Connect provider.

    The claim `tenant`, or else `sub`, names the tenant; `scope` lists the scopes.
    """

    def __init__(self, issuer: str, audience: str | None) -> None:
        """Take tokens that `issuer` made for `audience`; nothing is fetched yet.

        Raises:
            RequestError: the audience is missing, or the issuer is not reached by https.
        """
        if not audience:
            raise RequestError(
                "BITWRIGHT_OIDC_AUDIENCE is missing; without it, tokens made for others would be "
                "taken"
            )
        parts = urlsplit(issuer)
        if parts.scheme != "https" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
            raise RequestError(f"issuer {issuer!r} is not reached by https")
        self._issuer, self._audience = issuer, audience
        self._keys: jwt.PyJWKClient | None = None

    def caller(self, token: str) -> Caller:
        """Return who a token speaks for.

        Raises:
            NoCredentials: it is not valid, or the provider does not answer.
        """
        try:
            if self._keys is None:
                found = httpx2.get(
                    f"{self._issuer.rstrip('/')}/.well-known/openid-configuration", timeout=5
                ).raise_for_status()
                self._keys = jwt.PyJWKClient(found.json()["jwks_uri"], timeout=5)
            key = self._keys.get_signing_key_from_jwt(token).key
            claims: dict[str, Any] = jwt.decode(
                token, key, algorithms=_ALGORITHMS, audience=self._audience, issuer=self._issuer, leeway=_LEEWAY_SECONDS,
                options={"require": ["exp", "iss", "aud"]},
            )  # fmt: skip
        except (jwt.PyJWTError, httpx2.HTTPError, KeyError, ValueError) as error:
            raise NoCredentials(f"the token is not taken: {type(error).__name__}") from error
        tenant = str(claims.get("tenant") or claims.get("sub") or "")[:_LONGEST]
        if not tenant.isprintable() or not tenant:
            raise NoCredentials(
                "the token names neither a tenant nor a subject that can be printed"
            )
        return Caller(tenant, frozenset(str(claims.get("scope", "")).split()) & frozenset(SCOPES))


def is_key(credentials: str) -> bool:
    """Return whether credentials look like an API key, and not like a token."""
    return credentials.startswith(_PREFIX)


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _info(row: Any) -> KeyInfo:
    return KeyInfo(
        row.id,
        row.tenant,
        row.name,
        tuple(row.scopes),
        row.created_at,
        row.expires_at,
        row.revoked_at,
    )
