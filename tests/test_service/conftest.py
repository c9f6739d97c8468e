"""Fixtures of the job service's tests: databases of both kinds, and running servers."""

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from service.records.database import connect
from service.records.engine import bring_up_to_date
from service.storage.artifact_store import ArtifactStore
from tests.support.commands import SmallRun, bitwright_json, run_options
from tests.support.object_store import set_variables
from tests.support.postgres import Postgres
from tests.support.s3 import S3
from tests.support.served import Served, served
from tests.support.tiny_models import save_tiny
from tests.support.web_server import Resolver

KINDS = ("sqlite", "postgresql")


@pytest.fixture(scope="session")
def small_run(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """A run from an empty cache, made once."""
    folder = tmp_path_factory.mktemp("small_run")
    cache, out = folder / "cache", folder / "out"
    return SmallRun(cache, out, bitwright_json(*run_options(tiny_llama, cache, out)))


@pytest.fixture(scope="module")
def module_cache(small_run: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the cache of `small_run` that the tests of a module add to together."""
    return Path(shutil.copytree(small_run.cache, tmp_path_factory.mktemp("module") / "cache"))


@pytest.fixture
def warm_cache(small_run: SmallRun, tmp_path: Path) -> Path:
    """The test's own copy of a cache that has all stages of `small_run`."""
    return Path(shutil.copytree(small_run.cache, tmp_path / "warm"))


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A real PostgreSQL server."""
    server = Postgres()
    yield server
    server.remove()


@pytest.fixture(params=KINDS)
def database_kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def empty_database_url(database_kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a new empty database, of either kind."""
    if database_kind == "sqlite":
        return f"sqlite:///{tmp_path / 'empty.sqlite'}"
    server: Postgres = request.getfixturevalue("postgres")
    return server.fresh(f"empty_{abs(hash(str(tmp_path))):x}")


@pytest.fixture(scope="session")
def sqlite_with_tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file to be copied, for making all tables takes half a second."""
    path = tmp_path_factory.mktemp("tables") / "bitwright.sqlite"
    make_tables(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def postgres_with_tables(postgres: Postgres) -> str:
    """The name of a database to be copied."""
    make_tables(postgres.fresh("tables"))
    return "tables"


def make_tables(url: str) -> None:
    engine = connect(url)
    bring_up_to_date(engine)
    engine.dispose()


@pytest.fixture
def database_url(database_kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a new database of either kind with all tables."""
    if database_kind == "sqlite":
        shutil.copy(request.getfixturevalue("sqlite_with_tables"), tmp_path / "bitwright.sqlite")
        return f"sqlite:///{tmp_path / 'bitwright.sqlite'}"
    server: Postgres = request.getfixturevalue("postgres")
    template = request.getfixturevalue("postgres_with_tables")
    return server.fresh(f"test_{abs(hash(str(tmp_path))):x}", template)


@pytest.fixture
def database(database_url: str) -> Iterator[sa.Engine]:
    """A connected database of either kind with all tables."""
    engine = connect(database_url)
    yield engine
    engine.dispose()


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    server = S3()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def bucket(s3: S3) -> tuple[str, ArtifactStore]:
    """URL and store of a bucket; a client of its own for each test would take most of the time."""
    url = f"{s3.fresh()}/below/here"
    with pytest.MonkeyPatch.context() as patch:
        set_variables(patch, s3.url)
        store = ArtifactStore(url)
        store.check()
    return url, store


@pytest.fixture(params=["folder", "bucket"])
def place_of_store(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, ArtifactStore]:
    """URL and store, which is empty; processes that a test starts can reach it too."""
    if request.param == "folder":
        return str(tmp_path / "store"), ArtifactStore(str(tmp_path / "store"))
    set_variables(monkeypatch, request.getfixturevalue("s3").url)
    url, store = request.getfixturevalue("bucket")
    for kind in ("jobs", "profiles"):
        store._blobs.remove(store._blobs.sizes(kind))
    return url, store


@pytest.fixture
def url(place_of_store: tuple[str, ArtifactStore]) -> str:
    return place_of_store[0]


@pytest.fixture
def store(place_of_store: tuple[str, ArtifactStore]) -> ArtifactStore:
    return place_of_store[1]


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A socket that waits for connections of any family, and accepts none by itself."""
    try:
        server = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    except (OSError, ValueError):
        server = socket.create_server(("", 0))
    with server:
        server.setblocking(False)
        yield server


@pytest.fixture
def resolves(monkeypatch: pytest.MonkeyPatch) -> Resolver:
    """Have a name resolve to one list of addresses after another, the last for good.

    Return the names that are asked for.
    """
    real = socket.getaddrinfo

    def resolve(name: str, answers: list[list[str]]) -> list[str]:
        asked: list[str] = []

        def fake(host: str, port: int, *args: object, **options: object) -> list[object]:
            addresses = (
                answers[min(asked.count(name), len(answers) - 1)] if host == name else [host]
            )
            asked.append(host)
            return [
                found for address in addresses for found in real(address, port, *args, **options)
            ]  # type: ignore[arg-type]

        monkeypatch.setattr(socket, "getaddrinfo", fake)
        return asked

    return resolve


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that jobs may use, with a tiny model in it."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny(folder / "llama", "llama")
    return folder


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Served]:
    """A running server with a worker, on SQLite, for all tests that leave it running."""
    variables = {"BITWRIGHT_WEBHOOK_TARGETS": "127.0.0.0/8"}
    with served(tmp_path_factory.mktemp("served"), models, variables=variables) as running:
        yield running
