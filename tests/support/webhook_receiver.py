"""A real receiver of webhooks on this machine, for tests."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Receiver:
    """Requests that arrived, and how they are answered.

    Attributes:
        url: where it is reached.
        answer: from the number of the request, 0 for the first, to a status.
        received: bodies and headers in the order they came.
    """

    url: str = ""
    answer: Callable[[int], int] = lambda _: 204
    received: list[tuple[bytes, dict[str, str]]] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The bodies, as JSON values."""
        return [json.loads(body) for body, _ in self.received]


@contextmanager
def receiving(answer: Callable[[int], int] = lambda _: 204) -> Iterator[Receiver]:
    """Run a receiver within the context."""
    receiver = Receiver(answer=answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            number = len(receiver.received)
            receiver.received.append((body, dict(self.headers.items())))
            self.send_response(receiver.answer(number))
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    receiver.url = f"http://127.0.0.1:{server.server_port}/hook"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()
