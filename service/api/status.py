"""Routes about the service itself: capabilities, health, readiness, metrics."""

from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Response

from allocator.demands.menu import RANGES
from allocator.demands.ties import TARGETS
from allocator.profile import COUPLINGS, SCHEMA
from allocator.signals import SIGNALS
from quantizer.plans.plan import SCHEMA as PLAN_SCHEMA
from service.api.access import MetricsReader
from service.api.backend import BackendOfApp
from service.api.profiles import MAX_FILE_BYTES
from service.errors import StorageError, Unavailable
from service.records.database import is_current
from service.records.identity import SCOPES
from service.request.stage_names import STAGES

router = APIRouter(tags=["service"])


@router.get("/v1/capabilities", operation_id="capabilities")
def capabilities() -> dict[str, Any]:
    """Return what this service can do."""
    fidelities = {fidelity.name for span in RANGES for fidelity in span.fidelities}
    return {
        "version": version("bitwright"),
        "profile_schema": SCHEMA,
        "plan_schema": PLAN_SCHEMA,
        "stages": list(STAGES),
        "signals": list(SIGNALS),
        "targets": list(TARGETS),
        "couplings": list(COUPLINGS),
        "fidelities": sorted(fidelities),
        "scopes": SCOPES,
        "most_profile_bytes": MAX_FILE_BYTES,
    }


@router.get("/healthz", operation_id="health")
def health() -> dict[str, str]:
    """Answer, to show that the process does."""
    return {"status": "ok"}


@router.get("/readyz", operation_id="ready")
def ready(backend: BackendOfApp) -> dict[str, str]:
    """Answer if requests can be served.

    The database is up to date, the artifact store answers, and the process is not about to stop.
    """
    if backend.is_stopping():
        raise Unavailable("the service is about to stop")
    if not is_current(backend.database):
        raise Unavailable(
            "the database does not answer, or is not up to date; run bitwright migrate"
        )
    try:
        backend.artifacts.check()
    except StorageError as error:
        raise Unavailable("the artifact store does not answer") from error
    return {"status": "ready"}


@router.get("/metrics", operation_id="metrics", response_class=Response)
def metrics(backend: BackendOfApp, _: MetricsReader) -> Response:
    """Return metrics in Prometheus's text format."""
    return Response(backend.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
