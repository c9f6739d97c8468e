"""Points at which a test can kill the process, as a power cut would."""

import os
import signal
from pathlib import Path

FAILPOINT_VARIABLE = "BITWRIGHT_FAILPOINT"
"""Not a setting: only tests set it, in processes that they start."""


def failpoint(name: str) -> None:
    """Kill this process, once, if `BITWRIGHT_FAILPOINT` lists `name:file`.

    The file is created first; if it exists already, nothing happens. Several entries are separated
    by commas.
    """
    for entry in os.environ.get(FAILPOINT_VARIABLE, "").split(","):
        listed, _, marker = entry.partition(":")
        if listed != name:
            continue
        try:
            Path(marker).touch(exist_ok=False)
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)
