"""Promises of service.worker.local_runner.

Lines are read, nothing survives a stop or the worker, and an end without a result is an error.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from service.errors import StageKilled
from service.worker.local_runner import GRACE_SECONDS, LocalRunner
from service.worker.stage_runner import StageCall, Stopped
from tests.support.served import is_gone

TIE = "from service.process import live_and_die_with_parent as tie; tie(); "


def call(code: str, seconds: float = 30) -> StageCall:
    return StageCall([sys.executable, "-c", code], dict(os.environ), seconds)


def run(
    code: str, *, seconds: float = 30, stop: Any = lambda: False
) -> tuple[dict[str, Any], list[Any], list[str]]:
    progress: list[Any] = []
    log: list[str] = []
    return LocalRunner().run(call(code, seconds), progress.append, log.extend, stop), progress, log


def test_progress_messages_and_the_result_are_kept_apart() -> None:
    code = """
import sys
print('{"progress": {"done": 1}}', flush=True)
print('not JSON', flush=True)
print('a warning', file=sys.stderr, flush=True)
print('{"progress": {"done": 2}}')
print('{"outcome": {"found": "\\u00e9"}}', end='')
sys.stderr.write('the end')
"""
    last, progress, log = run(code)
    assert last == {"outcome": {"found": "é"}}
    assert progress == [{"done": 1}, {"done": 2}]
    assert log == ["a warning", "the end"]


def test_much_output_neither_blocks_nor_is_lost() -> None:
    code = """
import sys
for n in range(20000):
    print('{"progress": {"n": %d}}' % n)
    sys.stderr.write('line %d\\n' % n)
print('{"outcome": {}}')
"""
    last, progress, log = run(code)
    assert last == {"outcome": {}}
    assert [each["n"] for each in progress] == list(range(20000))
    assert log[-1] == "line 19999"
    assert len(log) == 20000


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "memory"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "signal 11"),
        ("raise SystemExit(7)", "exit code 7"),
        ("pass", "exit code 0"),
    ],
)
def test_an_end_without_a_result_says_how(code: str, words: str) -> None:
    with pytest.raises(StageKilled, match=words):
        run(code)


def test_a_stage_that_takes_too_long_is_stopped() -> None:
    start = time.monotonic()
    with pytest.raises(StageKilled, match="more than 1 s"):
        run("import time; time.sleep(60)", seconds=1)
    assert time.monotonic() - start < 5


def test_a_stop_ends_everything_that_the_stage_started_even_what_will_not_listen(
    tmp_path: Path,
) -> None:
    code = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])
open({str(tmp_path / "pids")!r}, 'w').write(str(child.pid))
time.sleep(60)
"""
    start = time.monotonic()
    with pytest.raises(Stopped):
        run(
            code,
            stop=lambda: (tmp_path / "pids").exists() and (tmp_path / "pids").read_text() != "",
        )
    assert time.monotonic() - start < GRACE_SECONDS + 4
    assert is_gone(int((tmp_path / "pids").read_text()), seconds=2)


def test_a_stage_dies_with_its_worker(tmp_path: Path) -> None:
    stage = (
        f"{TIE}import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); "
        "time.sleep(60)"
    )
    worker = f"""
import os, sys
from service.worker.local_runner import LocalRunner
from service.worker.stage_runner import StageCall
call = StageCall([sys.executable, '-c', {stage!r}], dict(os.environ), 60)
LocalRunner().run(call, print, print, lambda: False)
"""
    process = subprocess.Popen([sys.executable, "-c", worker])
    end = time.monotonic() + 20
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < end
        time.sleep(0.02)
    pid = int((tmp_path / "pid").read_text())
    assert psutil.pid_exists(pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert is_gone(pid, seconds=10)


def test_halting_ends_what_runs_and_reports_nothing() -> None:
    runner = LocalRunner()
    has_returned = threading.Event()

    def work() -> None:
        try:
            runner.run(call("import time; time.sleep(60)"), print, print, lambda: False)
        finally:
            has_returned.set()

    threading.Thread(target=work, daemon=True).start()
    while not runner._running:
        time.sleep(0.01)
    (process,) = runner._running
    runner.halt()
    assert process.poll() is not None
    assert not has_returned.wait(1)
