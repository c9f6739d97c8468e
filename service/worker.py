"""A worker: takes jobs from the queue, and looks after what others left lying."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from service import engine as durable
from service.artifacts import ArtifactStore
from service.database import connect, migrate
from service.errors import RequestError, ServiceError, Unavailable
from service.housekeeping import Housekeeper
from service.jobs import JobStore
from service.outbox import Outbox
from service.presence import Presence
from service.runner import LocalRunner
from service.settings import ServiceSettings, live_and_die_with_parent
from service.tracing import set_up_tracing
from service.work import Work

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


def bring_up_to_date(database: sa.Engine) -> None:
    """Make or update all tables.

    Raises:
        Unavailable: the database does not answer.
    """
    try:
        migrate(database)
        durable.prepare(database)
    except (InterfaceError, OperationalError) as error:
        reason = str(error.orig).strip().splitlines()[0] if error.orig else type(error).__name__
        raise Unavailable(
            f"the database does not answer: {reason}; see BITWRIGHT_DATABASE_URL"
        ) from error


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
