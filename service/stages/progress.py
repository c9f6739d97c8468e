"""How progress is reported."""

from typing import Protocol

from quantizer.durable import Progress


class Reporter(Protocol):
    """Shows the steps of a job. Everything that takes long is a step."""

    def step(self, label: str) -> Progress:
        """Begin the step `label`; return what to call with (parts done, parts in total)."""
        ...


class Silent:
    """A reporter that shows nothing."""

    def step(self, label: str) -> Progress:
        """Return a function that does nothing."""
        del label
        return lambda _done, _total: None
