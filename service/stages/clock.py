"""Wall time of the stages of a run."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Clock:
    """Measures how long stages take.

    Attributes:
        seconds: wall time by name of the stage, in the order in which stages ended.
    """

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Measure the wall time of the block under the name `stage`."""
        start = time.monotonic()
        yield
        self.seconds[stage] = time.monotonic() - start
