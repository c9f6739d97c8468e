"""The command `serve`: the REST interface."""

from typing import Annotated

from cyclopts import Parameter

from service.api.server import serve as run_server
from service.cli.parameters import Cache, Data
from service.settings import ServiceSettings, default_cache, default_data

DATA, CACHE = default_data(), default_cache()


def serve(
    *,
    host: Annotated[str, Parameter(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, Parameter(help="Port to listen at.")] = 8712,
    data: Data = DATA,
    cache: Cache = CACHE,
    worker: Annotated[bool, Parameter(help="Run a worker too.", negative="--no-worker")] = True,
    needs_key: Annotated[
        bool, Parameter(help="Ask for API keys; needed where other machines reach the host.")
    ] = False,
) -> None:
    """Serve the REST interface; its documentation is at /docs."""
    settings = ServiceSettings.read(data=data, cache=cache)
    run_server(host, port, settings, worker=worker, needs_key=needs_key)
