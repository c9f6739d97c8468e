"""Fixtures of the job service's tests: databases of both kinds, and running servers."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from service.database import connect
from service.worker import bring_up_to_date
from tests.postgres import Postgres
from tests.served import Served, served
from tests.tiny import save_tiny

KINDS = ("sqlite", "postgresql")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A real PostgreSQL server."""
    server = Postgres()
    yield server
    server.remove()


@pytest.fixture(params=KINDS)
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a new empty database, of either kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'bitwright.sqlite'}"
    server: Postgres = request.getfixturevalue("postgres")
    return server.fresh(f"test_{abs(hash(str(tmp_path))):x}")


@pytest.fixture
def database(database_url: str) -> Iterator[sa.Engine]:
    """A database of either kind with all tables."""
    engine = connect(database_url)
    bring_up_to_date(engine)
    yield engine
    engine.dispose()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that jobs may use, with a tiny model in it."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny(folder / "llama", "llama")
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Served]:
    """A running server with a worker, on SQLite."""
    variables = {"BITWRIGHT_WEBHOOK_TARGETS": "127.0.0.0/8"}
    with served(tmp_path_factory.mktemp("served"), models, variables=variables) as running:
        yield running
