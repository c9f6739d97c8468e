"""Promises of service.records.database.

The same tables in both kinds of database, migrated once whoever begins, and nothing pickled.
"""

import multiprocessing
import re
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from service.errors import RequestError
from service.records.database import connect, is_current, migrate
from service.records.engine import EngineClient
from service.records.job_service import JobService
from service.records.job_store import JobStore
from service.records.quota import Quota
from service.records.submission import Submission
from service.records.tables import metadata
from tests.support.commands import bitwright


def test_migrating_makes_exactly_the_tables_that_the_code_uses(empty_database_url: str) -> None:
    engine = connect(empty_database_url)
    assert not is_current(engine)
    migrate(engine)
    migrate(engine)
    assert is_current(engine)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


def _migrate(url: str) -> None:
    engine = connect(url)
    migrate(engine)
    engine.dispose()


def test_processes_that_migrate_at_once_wait_for_each_other(empty_database_url: str) -> None:
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_migrate, args=(empty_database_url,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    engine = connect(empty_database_url)
    assert is_current(engine)
    engine.dispose()


def test_a_database_that_is_away_is_not_current(tmp_path: object) -> None:
    assert not is_current(connect(f"postgresql://nobody@/none?host={tmp_path}"))


@pytest.mark.parametrize(
    "url", ["mysql://someone:hunter2@host/name", "no url: hunter2", "sqlite://"]
)
def test_other_databases_are_refused_without_repeating_a_password(url: str) -> None:
    with pytest.raises(RequestError) as refused:
        connect(url)
    assert "hunter2" not in str(refused.value)
    assert "postgresql" in str(refused.value)


def test_what_the_engine_stores_is_json_and_never_pickled(database: sa.Engine) -> None:
    job_service = JobService(JobStore(database), EngineClient(database).enqueue, Quota())
    job, _ = job_service.submit(Submission("someone", {"model": "m", "budget": "3bpw"}))
    schema = "" if database.dialect.name == "sqlite" else "dbos."
    with database.connect() as connection:
        (row,) = connection.execute(sa.text(f"SELECT * FROM {schema}workflow_status"))  # noqa: S608
    stored = str(dict(row._mapping))
    assert job.id in stored
    assert "portable_json" in stored
    assert not re.search(r"gAS[VR]|\\x80\\x0[345]", stored)


def test_a_worker_and_a_server_say_in_a_sentence_that_the_database_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITWRIGHT_DATABASE_URL", f"postgresql://me:hunter2@/none?host={tmp_path}")
    for command in ("worker", "serve", "migrate"):
        done = bitwright(command, "--data", tmp_path)
        assert done.returncode == 3
        assert "the database does not answer" in done.stderr
        assert "hunter2" not in done.stderr
