"""A worker: takes jobs from the queue, and looks after those of dead workers."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy.exc import DBAPIError

from service.errors import RequestError, ServiceError, Unavailable
from service.process import live_and_die_with_parent
from service.records import engine
from service.records.database import connect
from service.records.job_store import JobStore
from service.records.outbox import Outbox
from service.settings import ServiceSettings
from service.storage.artifact_store import ArtifactStore
from service.tracing import set_up_tracing
from service.worker.housekeeper import Housekeeper
from service.worker.local_runner import LocalRunner
from service.worker.stage_executor import StageExecutor
from service.worker.worker_lock import WorkerLock

SEND_SECONDS = 0.5
"""How often a worker sends the deliveries that are due."""
LOCK_SECONDS = 3.0
"""How often it checks that it still holds its lock."""
RECOVER_SECONDS = 5.0
"""How often it looks after jobs of dead workers."""
REMOVE_SECONDS = 600.0
"""How often it removes what has expired."""
DELIVERY_SECONDS = 30 * 86400.0
"""How long a delivery stays on record."""
LOST_SECONDS = 120.0
"""How long it goes on without the database before it gives up its jobs."""

log = logging.getLogger("bitwright.worker")


def run_worker(settings: ServiceSettings) -> None:
    """Work until SIGTERM or SIGINT.

    Then end what runs; this worker or another one starts it again.

    Raises:
        RequestError: a worker of this name runs already.
    """
    live_and_die_with_parent()
    set_up_tracing()
    database = connect(settings.database_url)
    engine.bring_up_to_date(database)
    lock = WorkerLock(database)
    lock.acquire(settings.worker)
    runner = LocalRunner()
    store = JobStore(database)
    artifacts = ArtifactStore(settings.artifacts)
    executor = StageExecutor(store, artifacts, runner, settings)
    engine.launch(database, settings.worker, executor, settings.slots)
    log.info("worker begins", extra={"worker": settings.worker})
    client = engine.EngineClient(database)
    housekeeper = Housekeeper(store, client, lock, artifacts, settings)
    outbox = Outbox(database, settings.webhook_targets)
    tasks = [
        _PeriodicTask(SEND_SECONDS, lambda: outbox.send_due(time.time())),
        _PeriodicTask(RECOVER_SECONDS, housekeeper.recover),
        _PeriodicTask(REMOVE_SECONDS, housekeeper.remove_expired),
        _PeriodicTask(REMOVE_SECONDS, lambda: outbox.remove_before(time.time() - DELIVERY_SECONDS)),
    ]
    stop = threading.Event()
    for how in (signal.SIGTERM, signal.SIGINT):
        signal.signal(how, lambda *_: stop.set())
    for task in tasks:
        threading.Thread(target=task.repeat, args=(stop,), daemon=True).start()
    try:
        _stay(lock, settings.worker, stop)
    finally:
        log.info("worker ends", extra={"worker": settings.worker})
        runner.halt()
        lock.release()
        logging.shutdown()
        # stages were cut off, so the process must end without unwinding, as in a crash: the journal
        # then starts them again
        os._exit(0 if stop.is_set() else 1)


def _stay(lock: WorkerLock, worker: str, stop: threading.Event) -> None:
    """Wait until `stop` is set, or until the worker has lost its lock."""
    answered = time.monotonic()
    while not stop.wait(LOCK_SECONDS):
        try:
            lock.ensure(worker)
            answered = time.monotonic()
        except Unavailable:
            if time.monotonic() - answered > LOST_SECONDS:
                log.exception(
                    "the database does not answer; the worker ends, and its jobs go on once it is "
                    "started again"
                )
                return
        except RequestError:
            log.exception("another process has taken this worker's lock; it ends")
            return


class _PeriodicTask:
    """Something that is repeated, even after an error."""

    def __init__(self, seconds: float, work: Callable[[], Any]) -> None:
        self._seconds = seconds
        self._work = work

    def repeat(self, stop: threading.Event) -> None:
        while not stop.wait(self._seconds):
            try:
                self._work()
            except (DBAPIError, ServiceError) as error:
                log.warning("%s: %s", type(error).__name__, str(error).splitlines()[0])
            except Exception:
                log.exception("a periodic task of the worker failed; it is repeated")
