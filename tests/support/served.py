"""A real server process of the job service, with its worker, for tests.

Started, killed, started again.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import psutil

from service.api.backend import Backend
from service.records.engine import bring_up_to_date
from service.settings import ServiceSettings
from tests.support.commands import environment

START_SECONDS = 180
SMALL_JOB = {
    "calibration_windows": 4,
    "tokens": 64,
    "probe_windows": 3,
    "probe_tokens": 32,
    "guard_windows": 2,
    "evaluation_windows": 3,
    "effort": "fast",
}
"""Options that make a job on a tiny model take seconds."""

ENDED = ("succeeded", "failed", "cancelled")


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Served:
    """One `bitwright serve`."""

    def __init__(
        self, data: Path, models: Path, *options: str, variables: Mapping[str, str] | None = None
    ) -> None:
        """Start it, keeping everything under `data`, with jobs on what is in `models`."""
        data.mkdir(parents=True, exist_ok=True)
        self.data = data
        self.port = free_port()
        self._options = options
        self.variables = {
            **environment(),
            "BITWRIGHT_DATA": str(data / "data"),
            "BITWRIGHT_CACHE": str(data / "cache"),
            "BITWRIGHT_MODELS": str(models),
            **(variables or {}),
        }
        self.process: subprocess.Popen[bytes]
        self.client: Any = None
        self.start()

    @property
    def url(self) -> str:
        """Where it is reached."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """Its log so far."""
        return (self.data / "server.log").read_text()

    def start(self, variables: Mapping[str, str] | None = None) -> None:
        """Start the process, and wait until it is ready."""
        command = [
            sys.executable,
            "-m",
            "service.cli.main",
            "serve",
            "--port",
            str(self.port),
            *self._options,
        ]
        with (self.data / "server.log").open("ab") as log:
            settings = {**self.variables, **(variables or {})}
            self.process = subprocess.Popen(
                command, env=settings, stdout=log, stderr=log, cwd=self.data
            )
        if self.client is not None:
            self.client.close()
        self.client = httpx2.Client(base_url=self.url, timeout=60)
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            try:
                if self.client.get("/readyz").status_code == 200:
                    return
            except httpx2.HTTPError:
                assert self.process.poll() is None, self.log
            time.sleep(0.05)
        raise AssertionError(f"not ready after {START_SECONDS} s: {self.log}")

    def workers(self) -> list[psutil.Process]:
        """Return the processes of workers below the server."""
        return [each for each in descendants(self.process.pid) if "worker" in command_line(each)]

    def stages(self) -> list[psutil.Process]:
        """Return the processes of stages below the server."""
        return [
            each
            for each in descendants(self.process.pid)
            if "service.stage_process.command" in command_line(each)
        ]

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """End the process, and return its exit code."""
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.process.wait(60)

    def submit(self, **options: Any) -> dict[str, Any]:
        """Submit a small job and return it."""
        answer = self.client.post(
            "/v1/jobs", json={**SMALL_JOB, "model": "llama", "budget": "4bpw", **options}
        )
        assert answer.status_code == 202, answer.text
        return dict(answer.json())

    def wait(
        self, job_id: str, seconds: float = 300, statuses: tuple[str, ...] = ENDED
    ) -> dict[str, Any]:
        """Wait until a job has one of the statuses, and return it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            job = self.client.get(f"/v1/jobs/{job_id}").json()
            if job["status"] in statuses:
                return dict(job)
            time.sleep(0.1)
        raise AssertionError(
            f"job {job_id} is {job['status']} in stage {job['stage']} after {seconds} s: "
            f"{self.log[-5000:]}"
        )


@contextmanager
def served(
    data: Path, models: Path, *options: str, variables: Mapping[str, str] | None = None
) -> Iterator[Served]:
    """Serve within the context."""
    server = Served(data, models, *options, variables=variables)
    try:
        yield server
    finally:
        server.stop(signal.SIGKILL)


def backend_in(folder: Path, *, needs_key: bool = False, **settings: Any) -> Backend:
    """Return the backend of an API in this process, all in one folder, with all tables."""
    values = {
        "database_url": f"sqlite:///{folder / 'bitwright.sqlite'}",
        "artifacts": str(folder / "artifacts"),
        "models": (folder,),
    }
    backend = Backend.of(
        ServiceSettings(data=folder, cache=folder / "cache", **{**values, **settings}),
        needs_key=needs_key,
    )
    bring_up_to_date(backend.database)
    return backend


def descendants(pid: int) -> list[psutil.Process]:
    """Return all processes below one."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def command_line(process: psutil.Process) -> list[str]:
    """Return the arguments of a process; none if it has ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def kill(pid: int) -> None:
    """Kill a process, if it exists."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def is_gone(pid: int, seconds: float = 10) -> bool:
    """Wait until a process has ended, whether or not its parent has waited for it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False
