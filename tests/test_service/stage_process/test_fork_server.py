"""Forked stages.

A fork does what the command does, starts sooner, and ends with its server and its worker.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from service.failpoint import FAILPOINT_VARIABLE
from service.process import stage_environment
from service.request.stage_names import request_place
from service.worker.fork_client import COMMAND, ForkClient, ForkedProcess
from tests.support.served import command_line, is_gone, kill

Begin = Callable[..., ForkedProcess]


@contextmanager
def beginning(client: ForkClient) -> Iterator[Begin]:
    """Start forks of one server, which end with the context."""
    begun = list[ForkedProcess]()

    def begin(arguments: list[str], **variables: str) -> ForkedProcess:
        begun.append(client.start(arguments, stage_environment() | variables))
        return begun[-1]

    try:
        yield begin
    finally:
        for process in begun:
            if process.poll() is None:
                kill(process.pid)
            process.wait(20)
            for stream in (process.stdout, process.stderr):
                assert stream is not None
                stream.close()


@pytest.fixture(scope="module")
def client() -> Iterator[ForkClient]:
    """A client for all tests: one whose server was killed starts another."""
    client = ForkClient()
    yield client
    client.stop()


@pytest.fixture
def begin(client: ForkClient) -> Iterator[Begin]:
    with beginning(client) as begin:
        yield begin


@pytest.fixture
def begin_anew() -> Iterator[Begin]:
    """The first fork starts a server."""
    client = ForkClient()
    with beginning(client) as begin:
        yield begin
    client.stop()


def command(folder: Path, job: str) -> list[str]:
    return [
        *COMMAND,
        "profile",
        "--job",
        job,
        "--artifacts",
        str(folder),
        "--cache",
        str(folder / "cache"),
    ]


def endless(folder: Path) -> list[str]:
    """Return the command of a stage that waits for its options, which never come."""
    place = folder / request_place("endless")
    place.mkdir(parents=True, exist_ok=True)
    if not (place / "manifest.json").exists():
        os.mkfifo(place / "manifest.json")
    return command(folder, "endless")


def said(process: ForkedProcess) -> tuple[bytes, bytes, int]:
    assert process.stdout is not None
    assert process.stderr is not None
    return process.stdout.read(), process.stderr.read(), process.wait(60)


def test_a_fork_says_and_returns_what_the_command_does_and_the_second_starts_sooner(
    begin_anew: Begin, tmp_path: Path
) -> None:
    seconds, printed = [], []
    for arguments in (
        command(tmp_path, "unknown"),
        command(tmp_path, "unknown"),
        [*COMMAND, "profile", "--nonsense"],
    ):
        whole = subprocess.run(arguments, env=stage_environment(), capture_output=True, check=False)
        start = time.monotonic()
        assert said(begin_anew(arguments)) == (whole.stdout, whole.stderr, whole.returncode)
        seconds.append(time.monotonic() - start)
        printed.append(whole.stdout)
    assert b"artifact unknown" in printed[0]
    assert whole.returncode == 2
    assert seconds[1] < seconds[0] / 4


def test_a_fork_has_a_session_a_name_and_the_variables_of_its_own_call(
    begin: Begin, tmp_path: Path
) -> None:
    marker = tmp_path / "killed"
    first = begin(command(tmp_path, "unknown"), **{FAILPOINT_VARIABLE: f"profile-started:{marker}"})
    assert first.wait(60) == -signal.SIGKILL
    marker.unlink()
    process = begin(endless(tmp_path))
    end = time.monotonic() + 20
    while "endless" not in command_line(psutil.Process(process.pid)) and time.monotonic() < end:
        time.sleep(0.02)
    assert tuple(command_line(psutil.Process(process.pid))[1:4]) == (
        "-m",
        "service.stage_process.command",
        "profile",
    )
    assert os.getsid(process.pid) == process.pid
    assert process.poll() is None
    assert not marker.exists()
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(20) == process.poll() == -signal.SIGTERM


def test_stages_run_side_by_side_and_one_that_is_killed_leaves_the_others(
    begin: Begin, tmp_path: Path
) -> None:
    one, other = (begin(endless(tmp_path)) for _ in range(2))
    os.kill(one.pid, signal.SIGKILL)
    assert one.wait(20) == -signal.SIGKILL
    assert other.poll() is None
    assert said(begin(command(tmp_path, "unknown")))[2] == 0


def test_stages_end_with_their_server_and_another_server_takes_its_place(
    begin: Begin, tmp_path: Path
) -> None:
    process = begin(endless(tmp_path))
    psutil.Process(process.pid).parent().kill()
    assert process.wait(20) == -signal.SIGKILL
    assert is_gone(process.pid)
    assert said(begin(command(tmp_path, "unknown")))[2] == 0


@pytest.mark.parametrize("asks", ["before", "after"])
def test_a_stage_whose_server_ends_as_it_is_asked_is_forked_by_another(
    begin: Begin, tmp_path: Path, asks: str
) -> None:
    server = psutil.Process(begin(endless(tmp_path)).pid).parent()
    assert server is not None
    server.suspend()
    ends = threading.Timer(0.5 if asks == "before" else 0.0, server.kill)
    ends.start()
    if asks == "after":
        ends.join()
    process = begin(command(tmp_path, "unknown"))
    assert said(process)[2] == 0


def test_a_server_and_its_stages_end_with_the_worker(tmp_path: Path) -> None:
    worker = f"""
import time
from service.worker.fork_client import ForkClient
from service.process import stage_environment
print(ForkClient().start({endless(tmp_path)!r}, stage_environment()).pid, flush=True)
time.sleep(600)
"""
    with subprocess.Popen(
        [sys.executable, "-c", worker], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        stage = psutil.Process(int(process.stdout.readline()))
        server = stage.parent()
        assert server is not None
        process.kill()
    assert is_gone(stage.pid)
    assert is_gone(server.pid)


def test_a_server_that_cannot_start_is_an_error(begin_anew: Begin, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="could be forked"):
        begin_anew(command(tmp_path, "unknown"), PYTHONHOME="/nowhere")
    assert said(begin_anew(command(tmp_path, "unknown")))[2] == 0
