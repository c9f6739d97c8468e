"""Which workers live: a worker holds a lock under its name until its process ends, however it ends.

In PostgreSQL it is an advisory lock of a connection, in SQLite a lock on a file beside the
database. So whoever can take the lock of a worker knows, without clocks or heartbeats, that it is
dead.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa
from filelock import FileLock, Timeout
from sqlalchemy.exc import DBAPIError

from service.errors import RequestError, Unavailable


class WorkerLock:
    """The lock of this process's worker, and a look at those of others."""

    def __init__(self, engine: sa.Engine) -> None:
        """Use the database behind `engine`; no lock is taken yet."""
        self._engine = engine
        self._connection: sa.Connection | None = None
        self._file: FileLock | None = None

    def acquire(self, worker: str) -> None:
        """Take the lock of a name, for as long as this process lives.

        Raises:
            RequestError: another process holds it.
        """
        if not self._try_acquire(worker):
            raise RequestError(
                f"a worker named {worker!r} runs already; give this one another name "
                "(BITWRIGHT_WORKER)"
            )

    def _try_acquire(self, worker: str) -> bool:
        if self._engine.dialect.name == "sqlite":
            self._file = self._file_lock(worker)
            try:
                self._file.acquire(timeout=0)
            except Timeout:
                return False
            return True
        connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        query = sa.select(sa.func.pg_try_advisory_lock(_number(worker)))
        if not connection.execute(query).scalar():
            connection.close()
            return False
        self._connection = connection
        return True

    def ensure(self, worker: str) -> None:
        """Check that the lock is still held; take it again if the connection broke.

        Raises:
            Unavailable: the database does not answer; call again.
            RequestError: another process took the lock meanwhile: this one must end.
        """
        if self._connection is None:
            if self._engine.dialect.name != "sqlite":
                self._acquire_again(worker)
            return
        try:
            self._connection.execute(sa.text("SELECT 1"))
        except DBAPIError:
            self.release()
            self._acquire_again(worker)

    def release(self) -> None:
        """Release the lock, as the end of the process does."""
        if self._connection is not None:
            self._connection.invalidate()
            self._connection.close()
            self._connection = None
        if self._file is not None:
            self._file.release()

    def _acquire_again(self, worker: str) -> None:
        try:
            self.acquire(worker)
        except DBAPIError as error:
            raise Unavailable("the database does not answer") from error

    @contextmanager
    def holding_if_dead(self, worker: str) -> Iterator[bool]:
        """Yield whether a worker is dead.

        If it is, its lock is held within the context, so that no worker of its name can start.
        """
        if self._engine.dialect.name == "sqlite":
            lock = self._file_lock(worker)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                yield False
                return
            try:
                yield True
            finally:
                lock.release()
            return
        query = sa.select(sa.func.pg_try_advisory_xact_lock(_number(worker)))
        with self._engine.connect() as connection, connection.begin():
            yield bool(connection.execute(query).scalar())

    def _file_lock(self, worker: str) -> FileLock:
        folder = Path(str(self._engine.url.database)).parent / "workers"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{hashlib.sha256(worker.encode()).hexdigest()[:32]}.lock")


def _number(worker: str) -> int:
    """Return the number of a worker's advisory lock in PostgreSQL."""
    digest = hashlib.sha256(f"bitwright worker {worker}".encode()).digest()
    return int.from_bytes(digest[:8], signed=True)
