"""`bitwright serve`: the API, and one worker beside it."""

import signal
from ipaddress import ip_address

import uvicorn

from service.api.app import create_app
from service.api.backend import Backend
from service.api.worker_supervisor import WorkerSupervisor
from service.errors import RequestError
from service.logs import err, set_up_service_logging
from service.process import live_and_die_with_parent
from service.records.engine import bring_up_to_date
from service.settings import ServiceSettings
from service.tracing import set_up_tracing

STOP_SECONDS = 20
"""How long requests under way may take once the process has to end."""
_MAX_HEADER_BYTES = 64 * 1024
_LARGEST_PORT = 65535


def serve(
    host: str, port: int, settings: ServiceSettings, *, worker: bool, needs_key: bool
) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        RequestError: there is no such port; others can reach the host, and no key is asked for; or
            a setting cannot be used.
    """
    if not 1 <= port <= _LARGEST_PORT:
        raise RequestError(f"port '{port}': give a whole number from 1 to {_LARGEST_PORT}")
    if not needs_key and not _is_loopback(host):
        raise RequestError(
            f"host {host!r} can be reached by others, who would need no key; add --keys, or use "
            "127.0.0.1"
        )
    err.print(f"serving http://{host}:{port}, documentation at /docs", highlight=False)
    live_and_die_with_parent()
    set_up_service_logging()
    backend = Backend.of(settings, needs_key=needs_key)
    if worker or backend.database.dialect.name == "sqlite":
        bring_up_to_date(backend.database)
    app = create_app(backend)
    set_up_tracing(app)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        timeout_graceful_shutdown=STOP_SECONDS,
        log_config=None,
        access_log=False,
        h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
        server_header=False,
    )
    server = uvicorn.Server(config)
    backend.is_stopping = lambda: server.should_exit
    supervisor = WorkerSupervisor(settings) if worker else None
    # uvicorn handles signals only while it listens; these count before and after
    for how in (signal.SIGTERM, signal.SIGINT):
        signal.signal(how, lambda *_: setattr(server, "should_exit", True))
    try:
        server.run()
    finally:
        if supervisor is not None:
            supervisor.stop()


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
