"""How the service's database is reached and brought up to date."""

from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.exc import ArgumentError, DBAPIError

from service.errors import RequestError
from service.storage.disk import make_folder

BUSY_MS = 30_000
"""How long a writer waits for another one in SQLite."""


def connect(url: str) -> sa.Engine:
    """Return an engine for `sqlite:///file` or `postgresql://...`; nothing is connected yet.

    Raises:
        RequestError: the URL names another kind of database. The message does not repeat it, as it
            may hold a password.
        StorageError: the folder of the database cannot be made.
    """
    try:
        parsed = sa.make_url(url)
    except ArgumentError as error:
        raise RequestError(
            "the database URL cannot be understood; use sqlite:///FILE or "
            "postgresql://USER@HOST/NAME"
        ) from error
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername == "postgresql+psycopg":
        return sa.create_engine(parsed, pool_pre_ping=True, pool_size=10, max_overflow=20)
    if parsed.drivername != "sqlite" or not parsed.database:
        raise RequestError(
            f"database of kind {parsed.drivername!r}: use sqlite:///FILE or "
            "postgresql://USER@HOST/NAME"
        )
    make_folder(Path(parsed.database).parent)
    engine = sa.create_engine(parsed, connect_args={"timeout": BUSY_MS / 1000})
    sa.event.listen(engine, "connect", _set_up_sqlite)
    return engine


def _set_up_sqlite(connection: Any, _: Any) -> None:
    # a transaction locks at its begin, so that writers wait instead of failing at their first write
    connection.isolation_level = "IMMEDIATE"
    for setting in (
        f"busy_timeout={BUSY_MS}",
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
    ):
        connection.execute(f"PRAGMA {setting}")


def migrate(engine: sa.Engine) -> None:
    """Bring the tables up to date. Processes that do so at the same time wait for each other."""
    with engine.begin() as connection:
        if engine.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        else:
            connection.execute(
                sa.text("SELECT pg_advisory_xact_lock(hashtext('bitwright migrations'))")
            )
        config = _alembic()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def is_current(engine: sa.Engine) -> bool:
    """Return whether the database answers and its tables are up to date."""
    try:
        with engine.connect() as connection:
            found = MigrationContext.configure(connection).get_current_revision()
    except DBAPIError:
        return False
    return found == ScriptDirectory.from_config(_alembic()).get_current_head()


def _alembic() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
    config.set_main_option("path_separator", "os")
    return config
