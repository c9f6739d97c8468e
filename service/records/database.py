"""The service's tables, and how a database is reached and brought up to date.

SQLite and PostgreSQL, the same tables in both.
"""

from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.exc import ArgumentError, DBAPIError

from service.errors import RequestError

BUSY_MS = 30_000
"""How long a writer waits for another in SQLite."""

metadata = sa.MetaData()

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),  # begins with the time: ids sort by creation
    sa.Column("tenant", sa.String(80), nullable=False),
    sa.Column("name", sa.String(200), nullable=False),
    sa.Column("request", sa.JSON, nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("parent", sa.String(40)),
    sa.Column("profile", sa.String(64)),
    sa.Column("idempotency_key", sa.String(255)),
    sa.Column("body_sha256", sa.String(64), nullable=False),
    sa.Column("status", sa.String(20), nullable=False),
    sa.Column("stage", sa.String(40)),
    sa.Column("progress", sa.JSON),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),  # of the row; the number of its newest event
    sa.Column("worker", sa.String(200)),
    sa.Column("result", sa.JSON),
    sa.Column("error", sa.JSON),
    sa.Column("stored_bytes", sa.BigInteger, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),  # times are seconds since 1970, UTC
    sa.Column("started_at", sa.Float),
    sa.Column("finished_at", sa.Float),
    sa.UniqueConstraint("tenant", "idempotency_key", name="one_job_for_a_key"),
    sa.Index("jobs_by_tenant", "tenant", "id"),
    sa.Index("jobs_by_status", "status", "id"),
)

labels = sa.Table(
    "labels",
    metadata,
    sa.Column("job_id", sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("name", sa.String(63), primary_key=True),
    sa.Column("value", sa.String(200), nullable=False),
    sa.Index("labels_by_value", "name", "value"),
)

events = sa.Table(
    "events",
    metadata,
    sa.Column("job_id", sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("type", sa.String(40), nullable=False),
    sa.Column("data", sa.JSON, nullable=False),
)

log_lines = sa.Table(
    "log_lines",
    metadata,
    sa.Column(
        "id",
        sa.BigInteger().with_variant(sa.Integer, "sqlite"),
        primary_key=True,
        autoincrement=True,
    ),
    sa.Column("job_id", sa.ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("stage", sa.String(40), nullable=False),
    sa.Column("text", sa.Text, nullable=False),
    sa.Index("log_lines_by_job", "job_id", "id"),
)

stage_runs = sa.Table(
    "stage_runs",
    metadata,
    sa.Column("job_id", sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("attempt", sa.Integer, primary_key=True),
    sa.Column("stage", sa.String(40), primary_key=True),
    sa.Column("worker", sa.String(200), nullable=False),
    sa.Column("started_at", sa.Float, nullable=False),
    sa.Column("finished_at", sa.Float),
    sa.Column("starts", sa.Integer, nullable=False),
)

profiles = sa.Table(
    "profiles",
    metadata,
    sa.Column("tenant", sa.String(80), primary_key=True),
    sa.Column("digest", sa.String(64), primary_key=True),
    sa.Column("created_at", sa.Float, nullable=False),
)

tenants = sa.Table(
    "tenants",
    metadata,
    sa.Column("name", sa.String(80), primary_key=True),
    sa.Column("most_active_jobs", sa.Integer),
    sa.Column("most_stored_bytes", sa.BigInteger),
    sa.Column("keep_days", sa.Float),
)

api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("tenant", sa.String(80), nullable=False),
    sa.Column("name", sa.String(200), nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False, unique=True),
    sa.Column("scopes", sa.JSON, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("expires_at", sa.Float),
    sa.Column("revoked_at", sa.Float),
)

webhooks = sa.Table(
    "webhooks",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("tenant", sa.String(80), nullable=False),
    sa.Column("url", sa.String(2000), nullable=False),
    sa.Column(
        "secret", sa.String(200), nullable=False
    ),  # signing needs it; it is shown once, and never again
    sa.Column("events", sa.JSON, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Index("webhooks_by_tenant", "tenant", "id"),
)

deliveries = sa.Table(
    "deliveries",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("webhook_id", sa.ForeignKey("webhooks.id", ondelete="CASCADE"), nullable=False),
    sa.Column("job_id", sa.String(40)),  # none: a test
    sa.Column("seq", sa.Integer, nullable=False),
    sa.Column("type", sa.String(40), nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("status", sa.String(20), nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("next_at", sa.Float, nullable=False),
    sa.Column("answer", sa.String(200)),
    sa.Index("deliveries_due", "status", "next_at"),
    sa.Index("deliveries_by_webhook", "webhook_id", "id"),
)


def connect(url: str) -> sa.Engine:
    """Return an engine for `sqlite:///file` or `postgresql://...`; nothing is connected yet.

    Raises:
        RequestError: the URL names another kind of database. The message does not repeat it, as it
            may hold a password.
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
    Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(parsed, connect_args={"timeout": BUSY_MS / 1000})
    sa.event.listen(engine, "connect", _set_up_sqlite)
    return engine


def _set_up_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = (
        "IMMEDIATE"  # writers queue up instead of failing when they come to write
    )
    for setting in (
        f"busy_timeout={BUSY_MS}",
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
    ):
        connection.execute(f"PRAGMA {setting}")


def migrate(engine: sa.Engine) -> None:
    """Bring the tables up to date; processes that do so at once wait for each other."""
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
