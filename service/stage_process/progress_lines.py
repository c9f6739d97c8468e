"""Progress and results of a stage's process: one JSON document a line."""

import json
import time
from collections.abc import Mapping
from math import isfinite
from typing import Any, TextIO

from quantizer.durable import Progress

PROGRESS_SECONDS = 2.0
"""Shortest time between two lines of progress of one step."""
STILL_SECONDS = 15.0
"""Shortest time between two lines that are less than a hundredth of the step apart."""


class ProgressLines:
    """A reporter that writes lines of JSON from time to time, with the time left."""

    def __init__(self, stage: str, sink: TextIO) -> None:
        """Report the progress of `stage` to `sink`."""
        self._stage = stage
        self._sink = sink

    def step(self, label: str) -> Progress:
        """Begin a step."""
        start = time.monotonic()
        last = 0.0
        reported = 0

        def update(done: int, total: int) -> None:
            nonlocal last, reported
            now = time.monotonic()
            pause = PROGRESS_SECONDS if done - reported >= total / 100 else STILL_SECONDS
            if done < total and now - last < pause:
                return
            last = now
            reported = done
            left = (now - start) * (total - done) / max(done, 1)
            progress = {
                "stage": self._stage,
                "step": label,
                "done": done,
                "total": total,
                "seconds_left": round(left, 1),
            }
            write_line(self._sink, {"progress": progress})

        return update


def write_line(sink: TextIO, document: Mapping[str, Any]) -> None:
    """Write one document as a line."""
    sink.write(json.dumps(finite(document)) + "\n")
    sink.flush()


def finite(document: Any) -> Any:
    """Return a document with None for numbers that JSON cannot express.

    An example is the perplexity of a model that outputs noise.
    """
    if isinstance(document, Mapping):
        return {key: finite(value) for key, value in document.items()}
    if isinstance(document, list | tuple):
        return [finite(value) for value in document]
    return None if isinstance(document, float) and not isfinite(document) else document
