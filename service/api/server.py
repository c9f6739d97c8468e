"""`bitwright serve`: the API, and one worker beside it."""

import logging
import os
import signal
import subprocess
import sys
import threading
from ipaddress import ip_address

import uvicorn

from service.api.app import create_app
from service.api.backend import Backend
from service.errors import RequestError
from service.logs import set_up_service_logging
from service.process import PARENT_VARIABLE, live_and_die_with_parent
from service.records.engine import bring_up_to_date
from service.settings import CACHE_VARIABLE, DATA_VARIABLE, ServiceSettings
from service.tracing import set_up_tracing

STOP_SECONDS = 20
"""How long requests that are being answered may take once the process is told to end."""
_PAUSE_SECONDS = 1.0
_WORKER_STOP_SECONDS = 15

log = logging.getLogger("bitwright.server")


def serve(
    host: str, port: int, settings: ServiceSettings, *, worker: bool, needs_key: bool
) -> None:
    """Serve until told to end.

    Raises:
        RequestError: others can reach the host, and no key is asked for; or a setting cannot be
            used.
    """
    if not needs_key and not _is_loopback(host):
        raise RequestError(
            f"host {host!r} can be reached by others, who would need no key; add --keys, or use "
            "127.0.0.1"
        )
    live_and_die_with_parent()
    set_up_service_logging()
    backend = Backend.of(settings, needs_key=needs_key)
    if worker or backend.database.dialect.name == "sqlite":
        bring_up_to_date(backend.database)
    app = create_app(backend)
    set_up_tracing(app)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            timeout_graceful_shutdown=STOP_SECONDS,
            log_config=None,
            access_log=False,
            h11_max_incomplete_event_size=64 * 1024,
            server_header=False,
        )
    )
    backend.is_stopping = lambda: server.should_exit
    keeper = _WorkerKeeper(settings) if worker else None
    for how in (signal.SIGTERM, signal.SIGINT):
        signal.signal(
            how, lambda *_: setattr(server, "should_exit", True)
        )  # before it listens to signals itself, and after
    try:
        server.run()
    finally:
        if keeper is not None:
            keeper.stop()


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


class _WorkerKeeper:
    """Runs a worker as a process of its own, and starts it again when it dies."""

    def __init__(self, settings: ServiceSettings) -> None:
        folders = {
            DATA_VARIABLE: str(settings.data.absolute()),
            CACHE_VARIABLE: str(settings.cache.absolute()),
        }
        self._variables = {**os.environ, **folders, PARENT_VARIABLE: str(os.getpid())}
        self._stopping = threading.Event()
        self._process = self._start()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "service.cli.main", "worker"]
        return subprocess.Popen(command, env=self._variables, stdin=subprocess.DEVNULL)  # noqa: S603  a list of arguments

    def _watch(self) -> None:
        while not self._stopping.wait(_PAUSE_SECONDS):
            code = self._process.poll()
            if code is not None:
                log.warning("the worker ended with code %d; it is started again", code)
                self._process = self._start()
        # in this thread: a worker dies at once with the thread that started it
        self._process.terminate()
        try:
            self._process.wait(_WORKER_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def stop(self) -> None:
        """End the worker."""
        self._stopping.set()
        self._thread.join()
