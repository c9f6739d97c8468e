"""Whether a container does its work, for HEALTHCHECK: `python health.py api|worker`.

Exit code 0 says yes, 1 no and why.

The API must answer `/healthz`. A worker must be alive, neither stopped nor a zombie, and able to
write to its data folder.
Only the standard library is loaded, as this runs every few seconds.
"""  # noqa: INP001  lies alone in the image

import os
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

API = "http://127.0.0.1:8712/healthz"
_SECONDS = 4
_ABSENT = "TtZXx"
"""States of a process that is stopped, traced or dead."""
_PROGRAMS = {b"bitwright", b"service.cli.main"}
"""How the command line is started: by its script, and by `bitwright serve` as a module."""


def api_trouble(url: str = API) -> str | None:
    """Return why the API is not well, None if it is."""
    try:
        with urllib.request.urlopen(url, timeout=_SECONDS):  # noqa: S310  an address of this container
            return None
    except (OSError, urllib.error.URLError) as error:
        return f"{url} did not answer with success: {error}"


def worker_trouble(data: Path, proc: Path = Path("/proc")) -> str | None:
    """Return why no worker is at work, or why it could not write to the folder `data`.

    None if all is well.
    """
    if not any(_is_worker(process) for process in proc.iterdir() if process.name.isdigit()):
        return "no process `bitwright worker` is running"
    try:
        data.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=data):
            return None
    except OSError as error:
        return f"nothing can be written to {data}: {error}"


def _is_worker(process: Path) -> bool:
    try:
        words = (process / "cmdline").read_bytes().split(b"\0")
        state = (process / "stat").read_text().rpartition(") ")[2][:1]
    except OSError:  # it has just ended
        return False
    programs = {os.path.basename(word) for word in words}  # noqa: PTH119  bytes
    return bool(programs & _PROGRAMS) and b"worker" in words and state not in _ABSENT


def main(role: str) -> int:
    """Tell on stderr what troubles the container's role and return the exit code."""
    trouble = api_trouble() if role == "api" else worker_trouble(Path(os.environ["BITWRIGHT_DATA"]))
    if trouble:
        sys.stderr.write(f"{trouble}\n")
    return 1 if trouble else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
