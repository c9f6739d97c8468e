"""How long work tells of itself."""

from typing import Protocol

from quantizer.durable import Progress


class Reporter(Protocol):
    """Shows the steps of a job.

    Everything that takes long gets a step, told of each finished part.
    """

    def step(self, label: str) -> Progress:
        """Return what is to be called with (parts done, parts in all) of the step called `label`."""
        ...


class Silent:
    """A reporter that shows nothing."""

    def step(self, label: str) -> Progress:
        """Return a function that ignores what it is told."""
        del label
        return lambda _done, _total: None
