"""Which tenants hold which profiles. A profile that two of them measured is stored once."""

import time

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from service.errors import ProfileUnknown
from service.records.database import profiles


class Holdings:
    """Profiles by tenant, in the database."""

    def __init__(self, engine: sa.Engine) -> None:
        """Use the tables behind `engine`."""
        self._engine = engine

    def add(self, tenant: str, digest: str) -> None:
        """Note that a tenant holds a profile."""
        with self._engine.begin() as connection:
            hold(connection, tenant, digest)

    def all(self, tenant: str) -> list[str]:
        """Return the digests of a tenant's profiles, in order."""
        query = (
            sa.select(profiles.c.digest)
            .where(profiles.c.tenant == tenant)
            .order_by(profiles.c.digest)
        )
        with self._engine.connect() as connection:
            return list(connection.execute(query).scalars())

    def check(self, tenant: str, digest: str) -> None:
        """Refuse a profile that a tenant does not hold.

        Raises:
            ProfileUnknown: it is not there, or another tenant's.
        """
        with self._engine.connect() as connection:
            held = sa.select(profiles).where(
                profiles.c.tenant == tenant, profiles.c.digest == digest
            )
            if "\0" in digest or connection.execute(held).one_or_none() is None:
                raise ProfileUnknown(
                    f"there is no profile {digest[:80]!r}; list them, or import one"
                )

    def drop(self, tenant: str, digest: str) -> bool:
        """Let go of a profile; return whether nobody holds it any more.

        Raises:
            ProfileUnknown: it is not there, or another tenant's.
        """
        self.check(tenant, digest)
        with self._engine.begin() as connection:
            connection.execute(
                sa.delete(profiles).where(profiles.c.tenant == tenant, profiles.c.digest == digest)
            )
            left = sa.select(sa.func.count()).where(profiles.c.digest == digest)
            return connection.execute(left).scalar_one() == 0


def hold(connection: sa.Connection, tenant: str, digest: str) -> None:
    """Note in a transaction that a tenant holds a profile.

    It may hold it already, or another may note so now.
    """
    insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    row = insert(profiles).values(tenant=tenant, digest=digest, created_at=time.time())
    connection.execute(row.on_conflict_do_nothing())
