"""Traces by OpenTelemetry.

They need the extra `bitwright[otel]` and OTEL_EXPORTER_OTLP_ENDPOINT; without, nothing happens.

The exporter is configured by OpenTelemetry's own variables.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from fastapi import FastAPI

_ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
_NAME = "bitwright"


def is_traced() -> bool:
    """Return whether traces are wanted and can be made."""
    return bool(os.environ.get(_ENDPOINT)) and find_spec("opentelemetry.sdk") is not None


def set_up_tracing(app: FastAPI | None = None) -> None:
    """Send traces of this process, and of the requests of an application, to the endpoint."""
    if not is_traced():
        return
    from opentelemetry import trace  # noqa: PLC0415  an extra
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
    from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor  # noqa: PLC0415
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    provider = TracerProvider(resource=Resource.create({"service.name": _NAME}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    if app is not None:
        FastAPIInstrumentor.instrument_app(app, excluded_urls="healthz,readyz,metrics")


@contextmanager
def traced(name: str, **attributes: str | int) -> Iterator[dict[str, str]]:
    """Trace what is done within.

    Yield the variables that make a child process's traces part of it.
    """
    if not is_traced():
        yield {}
        return
    from opentelemetry import propagate, trace  # noqa: PLC0415  an extra

    with trace.get_tracer(_NAME).start_as_current_span(name, attributes=attributes):
        carrier: dict[str, str] = {}
        propagate.inject(carrier)
        yield {key.upper(): value for key, value in carrier.items()}
