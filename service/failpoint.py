"""Places where a test can have the process killed, to show that nothing is lost there."""

import os
import signal
from pathlib import Path

FAILPOINT_VARIABLE = "BITWRIGHT_FAILPOINT"
"""Read at each failpoint, and no setting: only tests set it, in processes that they start."""


def failpoint(name: str) -> None:
    """Kill this process if `BITWRIGHT_FAILPOINT` lists `name:file` and there is no such file yet.

    It is made first, so once.

    Several are separated by commas.
    """
    for listed in os.environ.get(FAILPOINT_VARIABLE, "").split(","):
        wanted, _, marker = listed.partition(":")
        if wanted != name:
            continue
        try:
            Path(marker).touch(exist_ok=False)
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)
