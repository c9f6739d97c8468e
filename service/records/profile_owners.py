"""Which tenants own which profiles. A profile that two tenants measured is stored once."""

import time

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from service.errors import ProfileUnknown
from service.records.tables import profiles


class ProfileOwners:
    """Profiles by tenant, in the database."""

    def __init__(self, engine: sa.Engine) -> None:
        """Use the tables behind `engine`."""
        self._engine = engine

    def add(self, tenant: str, digest: str) -> None:
        """Make a tenant an owner of a profile."""
        with self._engine.begin() as connection:
            add_owner(connection, tenant, digest)

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
        """Refuse a profile that a tenant does not own.

        Raises:
            ProfileUnknown: it does not exist, or is another tenant's.
        """
        owned = sa.select(profiles).where(profiles.c.tenant == tenant, profiles.c.digest == digest)
        with self._engine.connect() as connection:
            # PostgreSQL accepts no zero bytes
            if "\0" in digest or connection.execute(owned).one_or_none() is None:
                raise ProfileUnknown(
                    f"there is no profile {digest[:80]!r}; list them, or import one"
                )

    def remove(self, tenant: str, digest: str) -> bool:
        """End a tenant's ownership of a profile; return whether nobody owns it any more.

        Raises:
            ProfileUnknown: it does not exist, or is another tenant's.
        """
        self.check(tenant, digest)
        owned = profiles.c.tenant == tenant, profiles.c.digest == digest
        others = sa.select(sa.func.count()).where(profiles.c.digest == digest)
        with self._engine.begin() as connection:
            connection.execute(sa.delete(profiles).where(*owned))
            return connection.execute(others).scalar_one() == 0


def add_owner(connection: sa.Connection, tenant: str, digest: str) -> None:
    """Make a tenant an owner of a profile, in a transaction of the caller's.

    It may be one already, or become one at the same time.
    """
    insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    row = insert(profiles).values(tenant=tenant, digest=digest, created_at=time.time())
    connection.execute(row.on_conflict_do_nothing())
