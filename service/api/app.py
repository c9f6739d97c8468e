"""The REST application. `create_app` puts it together."""

import time
from importlib.metadata import version
from typing import Any
from urllib.parse import urlsplit

from asgi_correlation_id import CorrelationIdMiddleware
from fastapi import FastAPI, Response
from fastapi_offline import FastAPIOffline
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from allocator.demands.menu import RANGES
from allocator.demands.ties import TARGETS
from allocator.profile import COUPLINGS, SCHEMA
from allocator.signals import SIGNALS
from quantizer.plans.plan import SCHEMA as PLAN_SCHEMA
from service.api import jobs, problems, profiles, watching, webhooks
from service.api.backend import Backend, Here, SeesMetrics
from service.errors import BodyTooLarge, StorageError, Unavailable
from service.problems import problem_document
from service.records.database import is_current
from service.records.identity import SCOPES
from service.request.stage_names import STAGES

MOST_BODY_BYTES = 2 * profiles.MOST_BYTES + 2**20
"""Largest body where files are sent."""
MOST_JSON_BYTES = 16 * 2**20
"""Largest body elsewhere; tables of times and plans are the largest of these."""

_HERE = ("localhost", "127.0.0.1", "[::1]")


def create_app(backend: Backend) -> FastAPI:
    """Return the application on a backend."""
    app = FastAPIOffline(  # its documentation page fetches nothing from elsewhere
        title="Bitwright",
        version=version("bitwright"),
        summary="Fits language models into byte budgets.",
        description="Jobs squeeze a model into a budget and prove the result; profiles are immutable resources, and what-ifs on "
        "them are answered at once. Errors are RFC 9457 problems.",
        responses={"4XX": problems.DOCUMENTED, "5XX": problems.DOCUMENTED},
    )
    app.state.backend = backend
    problems.install(app)
    for router in (jobs.router, watching.router, profiles.router, webhooks.router):
        app.include_router(router)
    _add_service_routes(app)
    app.add_middleware(Measured, backend=backend)
    app.add_middleware(BodyLimit)
    if not backend.needs_key:
        app.add_middleware(SameOrigin)
        app.add_middleware(
            TrustedHostMiddleware, allowed_hosts=list(_HERE)
        )  # a page elsewhere cannot name this machine its own
    app.add_middleware(CorrelationIdMiddleware, header_name="X-Request-Id")
    return app


def _add_service_routes(app: FastAPI) -> None:
    """Add what tells of the service itself."""

    @app.get("/v1/capabilities", tags=["service"], operation_id="capabilities")
    def capabilities() -> dict[str, Any]:
        """Say what this service can do."""
        return {
            "version": version("bitwright"),
            "profile_schema": SCHEMA,
            "plan_schema": PLAN_SCHEMA,
            "stages": list(STAGES),
            "signals": list(SIGNALS),
            "targets": list(TARGETS),
            "couplings": list(COUPLINGS),
            "fidelities": sorted(
                {fidelity.name for span in RANGES for fidelity in span.fidelities}
            ),
            "scopes": SCOPES,
            "most_profile_bytes": profiles.MOST_BYTES,
        }

    @app.get("/healthz", tags=["service"], operation_id="health")
    def health() -> dict[str, str]:
        """Say that the process answers."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["service"], operation_id="ready")
    def ready(backend: Here) -> dict[str, str]:
        """Say that requests can be served.

        The database is up to date, the artifact store answers, and no stop is under way.
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

    @app.get("/metrics", tags=["service"], operation_id="metrics", response_class=Response)
    def metrics(backend: Here, caller: SeesMetrics) -> Response:
        """Return metrics in Prometheus's text format."""
        del caller
        return Response(
            backend.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )


class Measured:
    """Counts requests and their time by route, for the metrics."""

    def __init__(self, app: ASGIApp, backend: Backend) -> None:
        """Wrap an application."""
        self._app, self._metrics = app, backend.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Note how long the answer takes to begin, and its status."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(
                    scope.get("route"), "path", "none"
                )  # not the path: it would be another series for each job
                self._metrics.requests.labels(scope["method"], route, message["status"]).inc()
                self._metrics.request_seconds.labels(scope["method"], route).observe(
                    time.perf_counter() - start
                )
            await send(message)

        await self._app(scope, receive, noted)


class BodyLimit:
    """Refuses bodies that are too large, whether or not they say how large they are."""

    def __init__(self, app: ASGIApp) -> None:
        """Wrap an application."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count what is received."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = dict(scope["headers"])
        most = (
            MOST_BODY_BYTES
            if sent.get(b"content-type", b"").startswith(b"multipart/")
            else MOST_JSON_BYTES
        )
        error = BodyTooLarge(f"the body has more than {most} bytes")
        length = sent.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > most:
            await problems.respond_to(error)(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > most:
                raise error
            return message

        await self._app(scope, counted, send)


class SameOrigin:
    """Refuses what a page of another site sends to this machine through a browser."""

    def __init__(self, app: ASGIApp) -> None:
        """Wrap an application."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Compare the origin with the host."""
        headers = dict(scope["headers"]) if scope["type"] == "http" else {}
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and urlsplit(origin).netloc != headers.get(b"host", b"").decode("latin-1"):
            await problems.respond(
                problem_document(
                    "foreign-origin", 403, f"requests from {origin[:200]!r} are not served"
                )
            )(scope, receive, send)
            return
        await self._app(scope, receive, send)
