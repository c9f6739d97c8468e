"""The part of tracing that needs the extra `bitwright[otel]`; see `service.tracing`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from fastapi import FastAPI
from opentelemetry import propagate, trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

_NAME = "bitwright"


def set_up(app: FastAPI | None) -> None:
    """Send traces of this process, and of the requests of an application."""
    provider = TracerProvider(resource=Resource.create({"service.name": _NAME}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    if app is not None:
        FastAPIInstrumentor.instrument_app(app, excluded_urls="healthz,readyz,metrics")


@contextmanager
def span(name: str, attributes: Mapping[str, str | int]) -> Iterator[dict[str, str]]:
    """Trace what is done within the context, and yield the variables for child processes."""
    with trace.get_tracer(_NAME).start_as_current_span(name, attributes=attributes):
        carrier: dict[str, str] = {}
        propagate.inject(carrier)
        yield {key.upper(): value for key, value in carrier.items()}
