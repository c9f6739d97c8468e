"""What every request passes through: metrics, the limit of bodies, and the check of origins."""

import time
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api import problems
from service.api.metrics import Metrics
from service.errors import BodyTooLarge
from service.problems import problem_document

_FORBIDDEN = 403


class RequestMetrics:
    """Counts requests, and the time until their answers begin, by route."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        """Wrap an application."""
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                # not the path, which would be another time series for each job
                route = getattr(scope.get("route"), "path", "none")
                seconds = time.perf_counter() - start
                self._metrics.requests.labels(scope["method"], route, message["status"]).inc()
                self._metrics.request_seconds.labels(scope["method"], route).observe(seconds)
            await send(message)

        await self._app(scope, receive, counted)


class BodyLimit:
    """Refuses bodies that are too large, whether or not they announce their size."""

    def __init__(self, app: ASGIApp, max_json_bytes: int, max_form_bytes: int) -> None:
        """Wrap an application.

        Args:
            app: the application.
            max_json_bytes: largest body in general.
            max_form_bytes: largest body with files (multipart).
        """
        self._app = app
        self._max_json_bytes = max_json_bytes
        self._max_form_bytes = max_form_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        is_form = headers.get(b"content-type", b"").startswith(b"multipart/")
        max_bytes = self._max_form_bytes if is_form else self._max_json_bytes
        error = BodyTooLarge(f"the body has more than {max_bytes} bytes")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > max_bytes:
            await problems.respond_to(error)(scope, receive, send)
            return
        received_bytes = 0

        async def counted() -> Message:
            nonlocal received_bytes
            message = await receive()
            received_bytes += len(message.get("body", b""))
            if received_bytes > max_bytes:
                raise error
            return message

        await self._app(scope, counted, send)


class SameOrigin:
    """Refuses what a page of another site sends to this machine through a browser."""

    def __init__(self, app: ASGIApp) -> None:
        """Wrap an application."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        headers = dict(scope["headers"]) if scope["type"] == "http" else {}
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and urlsplit(origin).netloc != headers.get(b"host", b"").decode("latin-1"):
            document = problem_document(
                "foreign-origin", _FORBIDDEN, f"requests from {origin[:200]!r} are not served"
            )
            await problems.respond(document)(scope, receive, send)
            return
        await self._app(scope, receive, send)
