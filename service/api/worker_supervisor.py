"""The worker beside a server: a process of its own that is started again when it dies."""

import logging
import os
import subprocess
import sys
import threading

from service.process import PARENT_VARIABLE
from service.settings import CACHE_VARIABLE, DATA_VARIABLE, ServiceSettings

_CHECK_SECONDS = 1.0
_STOP_SECONDS = 15

log = logging.getLogger("bitwright.server")


class WorkerSupervisor:
    """Runs a worker, and starts it again when it dies."""

    def __init__(self, settings: ServiceSettings) -> None:
        """Start a worker with these settings."""
        folders = {
            DATA_VARIABLE: str(settings.data.absolute()),
            CACHE_VARIABLE: str(settings.cache.absolute()),
        }
        self._variables = {**os.environ, **folders, PARENT_VARIABLE: str(os.getpid())}
        self._is_stopping = threading.Event()
        self._process: subprocess.Popen[bytes]
        # a worker dies with the thread that started it, so the thread that watches it starts it
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _start(self) -> None:
        command = [sys.executable, "-m", "service.cli.main", "worker"]
        self._process = subprocess.Popen(  # noqa: S603  a list of arguments, no shell
            command, env=self._variables, stdin=subprocess.DEVNULL
        )

    def _watch(self) -> None:
        self._start()
        while not self._is_stopping.wait(_CHECK_SECONDS):
            code = self._process.poll()
            if code is not None:
                log.warning("the worker ended with code %d; it is started again", code)
                self._start()
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def stop(self) -> None:
        """End the worker."""
        self._is_stopping.set()
        self._thread.join()
