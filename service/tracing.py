"""Traces by OpenTelemetry.

They are sent if the extra `bitwright[otel]` is installed and OTEL_EXPORTER_OTLP_ENDPOINT is set.
The exporter is configured by OpenTelemetry's own variables.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from fastapi import FastAPI

_ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


def is_traced() -> bool:
    """Return whether traces are wanted and can be sent."""
    return bool(os.environ.get(_ENDPOINT)) and find_spec("opentelemetry.sdk") is not None


def set_up_tracing(app: FastAPI | None = None) -> None:
    """Send traces of this process, and of the requests of an application, to the endpoint."""
    if is_traced():
        from service import open_telemetry  # noqa: PLC0415  an extra

        open_telemetry.set_up(app)


@contextmanager
def traced(name: str, **attributes: str | int) -> Iterator[dict[str, str]]:
    """Trace what is done within the context.

    Yield the variables that make a child process's traces part of it.
    """
    if not is_traced():
        yield {}
        return
    from service import open_telemetry  # noqa: PLC0415  an extra

    with open_telemetry.span(name, attributes) as variables:
        yield variables
