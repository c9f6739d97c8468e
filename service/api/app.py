"""The REST application. `create_app` puts it together; `serve` runs it on this machine."""

from importlib.metadata import version
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from allocator.menu import RANGES
from allocator.profile import COUPLINGS, SCHEMA
from allocator.ties import TARGETS
from quantizer.plan import SCHEMA as PLAN_SCHEMA
from service.api import problems, profiles
from service.errors import BodyTooLarge, RequestError
from service.shelf import Shelf

MOST_BODY_BYTES = 2 * profiles.MOST_BYTES + 2**20
_STOP_SECONDS = 20
_HERE = ("localhost", "127.0.0.1", "[::1]", "testserver")


def create_app(data: Path) -> FastAPI:
    """Return the application that keeps its profiles under `data`."""
    app = FastAPI(
        title="Bitwright",
        version=version("bitwright"),
        summary="Fits language models into byte budgets.",
        description="Profiles are immutable resources; what-ifs on them are answered at once. Errors are RFC 9457 problems.",
    )
    app.state.shelf = Shelf(data / "profiles")
    problems.install(app)
    app.include_router(profiles.router)

    @app.get("/v1/capabilities", tags=["service"], operation_id="capabilities")
    def capabilities() -> dict[str, Any]:
        """Say what this service can do."""
        return {
            "version": version("bitwright"),
            "profile_schema": SCHEMA,
            "plan_schema": PLAN_SCHEMA,
            "targets": list(TARGETS),
            "couplings": list(COUPLINGS),
            "fidelities": sorted({fidelity.name for span in RANGES for fidelity in span.fidelities}),
            "most_profile_bytes": profiles.MOST_BYTES,
        }

    @app.get("/healthz", tags=["service"], operation_id="health")
    def health() -> dict[str, str]:
        """Say that the process answers."""
        return {"status": "ok"}

    app.add_middleware(BodyLimit)
    app.add_middleware(SameOrigin)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(_HERE))  # a page elsewhere cannot name this machine its own
    return app


def serve(host: str, port: int, data: Path) -> None:
    """Serve until interrupted.

    Raises:
        RequestError: the host is not this machine; there are no API keys yet, so nobody else is let in.
    """
    if host != "localhost" and not _loopback(host):
        raise RequestError(f"host {host!r} can be reached by others, and there are no API keys yet; use 127.0.0.1 or ::1")
    uvicorn.run(create_app(data), host=host, port=port, timeout_graceful_shutdown=_STOP_SECONDS, log_level="warning")


def _loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


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
        error = BodyTooLarge(f"the body has more than {MOST_BODY_BYTES} bytes")
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not length.isdigit() or int(length) > MOST_BODY_BYTES:
            await problems.respond(problems.problem_of(error))(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MOST_BODY_BYTES:
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
            await problems.respond(problems.plain("foreign-origin", 403, f"requests from {origin[:200]!r} are not served"))(
                scope, receive, send
            )
            return
        await self._app(scope, receive, send)
