"""A worker: takes jobs from the queue, and looks after what others left lying."""

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
from service.records import engine as durable
from service.records.database import connect
from service.records.engine import bring_up_to_date
from service.records.jobs import JobStore
from service.records.outbox import Outbox
from service.settings import ServiceSettings
from service.storage.artifact_store import ArtifactStore
from service.tracing import set_up_tracing
from service.worker.housekeeping import Housekeeper
from service.worker.liveness import Presence
from service.worker.runner import LocalRunner
from service.worker.work import Work

TICK_SECONDS = 0.5
KEEP_SECONDS, TIDY_SECONDS = 3.0, 5.0
"""How often a worker makes sure that it still holds its name, and looks after jobs whose worker is gone."""
RETAIN_SECONDS = 600.0
"""How often it removes what is kept no longer."""
DELIVERY_SECONDS = 30 * 86400.0
"""How long it is on record how a webhook's message went."""
LOST_SECONDS = 120.0
"""How long it goes on without the database before it gives up its jobs."""

log = logging.getLogger("bitwright.worker")


def run_worker(settings: ServiceSettings) -> None:
    """Work until the process is told to end.

    Then end what runs, for this worker or another to take up again.

    Raises:
        RequestError: a worker of this name runs already.
    """
    live_and_die_with_parent()
    set_up_tracing()
    database = connect(settings.database_url)
    bring_up_to_date(database)
    presence = Presence(database)
    presence.hold(settings.worker)
    runner, store = LocalRunner(), JobStore(database)
    artifacts = ArtifactStore(settings.artifacts)
    durable.launch(
        database, settings.worker, Work(store, artifacts, runner, settings), settings.slots
    )
    log.info("worker begins", extra={"worker": settings.worker})
    client = durable.Client(database)
    keeper = Housekeeper(store, client, presence, artifacts, settings)
    outbox = Outbox(database, settings.webhook_targets)
    rounds = [
        _Round(TICK_SECONDS, lambda: outbox.send_due(time.time())),
        _Round(TIDY_SECONDS, keeper.tidy),
        _Round(RETAIN_SECONDS, keeper.retain),
        _Round(RETAIN_SECONDS, lambda: outbox.forget(time.time() - DELIVERY_SECONDS)),
    ]
    stop = threading.Event()
    for how in (signal.SIGTERM, signal.SIGINT):
        signal.signal(how, lambda *_: stop.set())
    for each in rounds:
        threading.Thread(target=each.go_on, args=(stop,), daemon=True).start()
    try:
        _stay(presence, settings.worker, stop)
    finally:
        log.info("worker ends", extra={"worker": settings.worker})
        runner.halt()
        presence.let_go()
        logging.shutdown()
        os._exit(
            0 if stop.is_set() else 1
        )  # stages were cut off: to the journal it must look like a crash


def _stay(presence: Presence, worker: str, stop: threading.Event) -> None:
    """Stay until told to stop, or until the worker's name is lost."""
    heard = time.monotonic()
    while not stop.wait(KEEP_SECONDS):
        try:
            presence.keep(worker)
            heard = time.monotonic()
        except Unavailable:
            if time.monotonic() - heard > LOST_SECONDS:
                log.exception(
                    "the database is away; the worker gives up, its jobs go on once it is started "
                    "again"
                )
                return
        except RequestError:
            log.exception("another process has taken this worker's name; it ends")
            return


class _Round:
    """Something that is done again and again, whatever happened the last time."""

    def __init__(self, seconds: float, work: Callable[[], Any]) -> None:
        self._seconds, self._work = seconds, work

    def go_on(self, stop: threading.Event) -> None:
        while not stop.wait(self._seconds):
            try:
                self._work()
            except (DBAPIError, ServiceError) as error:
                log.warning("%s: %s", type(error).__name__, str(error).splitlines()[0])
            except Exception:
                log.exception("a round of the worker failed; it goes on")
