"""API keys in the database, as hashes."""

import hashlib
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from service.errors import NoCredentials, RequestError
from service.ids import new_id
from service.records.identity import MAX_TENANT_CHARACTERS, SCOPES, Caller
from service.records.tables import api_keys

_PREFIX = "bw_"
_KEY_BYTES = 32
_DAY_SECONDS = 86400.0


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What is known of an API key; of the key itself, only a hash is stored.

    Attributes:
        id: names the key.
        tenant: whose jobs and profiles it opens.
        name: what the tenant calls it.
        scopes: what it may do, of `SCOPES`.
        created_at: seconds since 1970, UTC, as are the next two.
        expires_at: when it expires; None for never.
        revoked_at: when it was revoked.
    """

    id: str
    tenant: str
    name: str
    scopes: tuple[str, ...]
    created_at: float
    expires_at: float | None
    revoked_at: float | None

    @classmethod
    def of(cls, row: Any) -> "ApiKey":
        """Return the key of a row."""
        return cls(
            id=row.id,
            tenant=row.tenant,
            name=row.name,
            scopes=tuple(row.scopes),
            created_at=row.created_at,
            expires_at=row.expires_at,
            revoked_at=row.revoked_at,
        )


class ApiKeys:
    """API keys in the database. A key is 256 random bits, so a plain hash cannot be guessed."""

    def __init__(self, engine: sa.Engine) -> None:
        """Use the tables behind `engine`."""
        self._engine = engine

    def create(
        self, tenant: str, name: str, scopes: Sequence[str], days: float | None = None
    ) -> tuple[ApiKey, str]:
        """Create a key; return what is known of it, and the key, which cannot be read again.

        Raises:
            RequestError: a scope does not exist, or the tenant's name is too long or empty.
        """
        unknown = [scope for scope in scopes if scope not in SCOPES]
        if unknown or not scopes:
            raise RequestError(
                f"scope {unknown[0] if unknown else ''!r} does not exist; use some of "
                f"{', '.join(SCOPES)}"
            )
        if not 0 < len(tenant) <= MAX_TENANT_CHARACTERS or not tenant.isprintable():
            raise RequestError(
                f"tenant {tenant[:100]!r}: give a name of 1 to {MAX_TENANT_CHARACTERS} characters"
            )
        key = _PREFIX + secrets.token_urlsafe(_KEY_BYTES)
        now = time.time()
        values = {
            "id": new_id("key"),
            "tenant": tenant,
            "name": name,
            "scopes": list(scopes),
            "sha256": _hash(key),
            "created_at": now,
            "expires_at": None if days is None else now + days * _DAY_SECONDS,
        }
        insert = sa.insert(api_keys).values(**values).returning(*api_keys.c)
        with self._engine.begin() as connection:
            return ApiKey.of(connection.execute(insert).one()), key

    def all(self) -> list[ApiKey]:
        """Return all keys, the oldest first."""
        query = sa.select(api_keys).order_by(api_keys.c.id)
        with self._engine.connect() as connection:
            return [ApiKey.of(row) for row in connection.execute(query)]

    def revoke(self, key_id: str) -> None:
        """Revoke a key for good.

        Raises:
            RequestError: no key that is in use has this id.
        """
        is_in_use = api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None)
        update = sa.update(api_keys).where(*is_in_use).values(revoked_at=time.time())
        with self._engine.begin() as connection:
            if not connection.execute(update).rowcount:
                raise RequestError(f"there is no key {key_id!r} in use; list them")

    def caller(self, key: str) -> Caller:
        """Return who a key belongs to.

        Raises:
            NoCredentials: it is unknown, revoked or expired.
        """
        query = sa.select(api_keys).where(api_keys.c.sha256 == _hash(key))
        with self._engine.connect() as connection:
            row = connection.execute(query).one_or_none()
        if row is None or row.revoked_at is not None or _is_over(row.expires_at):
            raise NoCredentials("the API key is unknown, revoked or expired")
        return Caller(row.tenant, frozenset(row.scopes))


def is_key(credentials: str) -> bool:
    """Return whether credentials look like an API key, and not like a token."""
    return credentials.startswith(_PREFIX)


def _is_over(expires_at: float | None) -> bool:
    return expires_at is not None and expires_at < time.time()


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
