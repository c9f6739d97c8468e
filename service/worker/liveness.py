"""Which workers live. A worker holds a lock under its name.

The lock is let go when its process ends, however it ends.

In PostgreSQL it is an advisory lock of a connection, in SQLite a lock on a file beside the
database. So whoever can take the lock of a worker knows that the worker is gone, without clocks and
heartbeats.
"""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa
from filelock import FileLock, Timeout
from sqlalchemy.exc import DBAPIError

from service.errors import RequestError, Unavailable


class Presence:
    """Locks of workers."""

    def __init__(self, engine: sa.Engine) -> None:
        """Use the database behind `engine`."""
        self._engine = engine
        self._held: sa.Connection | None = None
        self._file: FileLock | None = None
        self._lock = threading.Lock()

    def hold(self, worker: str) -> None:
        """Take the lock of a name, for as long as this process lives.

        Raises:
            RequestError: another process has it.
        """
        if not self._take(worker):
            raise RequestError(
                f"a worker named {worker!r} runs already; give this one another name "
                "(BITWRIGHT_WORKER)"
            )

    def _take(self, worker: str) -> bool:
        if self._engine.dialect.name == "sqlite":
            self._file = self._file_lock(worker)
            try:
                self._file.acquire(timeout=0)
            except Timeout:
                return False
            return True
        connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        taken = bool(
            connection.execute(sa.select(sa.func.pg_try_advisory_lock(_number(worker)))).scalar()
        )
        if taken:
            self._held = connection
        else:
            connection.close()
        return taken

    def keep(self, worker: str) -> None:
        """Make sure that the lock is still held; take it again if the connection broke.

        Raises:
            Unavailable: the database is away; ask again.
            RequestError: another process took it meanwhile: this one must end.
        """
        if self._held is None:
            if self._engine.dialect.name != "sqlite":
                self._retake(worker)
            return
        try:
            self._held.execute(sa.text("SELECT 1"))
        except DBAPIError:
            self.let_go()
            self._retake(worker)

    def let_go(self) -> None:
        """Let go of the lock, as the end of the process does."""
        if self._held is not None:
            self._held.invalidate()
            self._held.close()
            self._held = None
        if self._file is not None:
            self._file.release()

    def _retake(self, worker: str) -> None:
        try:
            self.hold(worker)
        except DBAPIError as error:
            raise Unavailable("the database does not answer") from error

    @contextmanager
    def absent(self, worker: str) -> Iterator[bool]:
        """Say whether a worker is gone; if it is, none of its name can start within the context."""
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
        with self._engine.connect() as connection, connection.begin():
            yield bool(
                connection.execute(
                    sa.select(sa.func.pg_try_advisory_xact_lock(_number(worker)))
                ).scalar()
            )

    def _file_lock(self, worker: str) -> FileLock:
        folder = Path(str(self._engine.url.database)).parent / "workers"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{hashlib.sha256(worker.encode()).hexdigest()[:32]}.lock")


def _number(worker: str) -> int:
    return int.from_bytes(
        hashlib.sha256(f"bitwright worker {worker}".encode()).digest()[:8], signed=True
    )
