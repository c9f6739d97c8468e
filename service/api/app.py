"""The REST application. `create_app` puts it together."""

from importlib.metadata import version

from asgi_correlation_id import CorrelationIdMiddleware
from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.middleware.trustedhost import TrustedHostMiddleware

from service.api import artifacts, events, jobs, problems, profiles, status, webhooks
from service.api.backend import Backend
from service.api.middleware import BodyLimit, RequestMetrics, SameOrigin

MAX_JSON_BYTES = 16 * 2**20
"""Largest body without files; tables of latencies and plans are the largest of these."""
MAX_FORM_BYTES = 2 * profiles.MAX_FILE_BYTES + 2**20
"""Largest body with files: the two of a profile."""

_LOCAL_HOSTS = ["localhost", "127.0.0.1", "[::1]"]


def create_app(backend: Backend) -> FastAPI:
    """Return the application on a backend."""
    app = FastAPIOffline(  # its documentation page fetches nothing from elsewhere
        title="Bitwright",
        version=version("bitwright"),
        summary="Fits language models into byte budgets.",
        description=(
            "A job quantizes a model within a budget and measures the result. Profiles are "
            "immutable resources; what-ifs on them are answered at once. Errors are problems "
            "(RFC 9457)."
        ),
        responses={"4XX": problems.DOCUMENTED, "5XX": problems.DOCUMENTED},
    )
    app.state.backend = backend
    problems.install(app)
    for part in (jobs, events, artifacts, profiles, webhooks, status):
        app.include_router(part.router)
    app.add_middleware(RequestMetrics, metrics=backend.metrics)
    app.add_middleware(BodyLimit, max_json_bytes=MAX_JSON_BYTES, max_form_bytes=MAX_FORM_BYTES)
    if not backend.needs_key:
        app.add_middleware(SameOrigin)
        # without keys, only this machine is served: a page elsewhere must not reach it under
        # another name (DNS rebinding)
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=_LOCAL_HOSTS)
    app.add_middleware(CorrelationIdMiddleware, header_name="X-Request-Id")
    return app
