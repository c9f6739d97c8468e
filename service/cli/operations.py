"""Commands of the job service: serve, worker, migrate, keys, quota."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli.console import out, print_json, print_pairs, told_errors
from service.logs import err
from service.settings import CACHE_VARIABLE, DATA_VARIABLE, default_cache, default_data

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from service.records.identity import Keys

_DEFAULT_DATA, _DEFAULT_CACHE = default_data(), default_cache()

Data = Annotated[
    Path, typer.Option(help="Folder of the service: database, artifacts.", envvar=DATA_VARIABLE)
]
Cache = Annotated[Path, typer.Option(help="Folder of finished stages.", envvar=CACHE_VARIABLE)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]

keys = typer.Typer(name="keys", help="API keys of the service.", no_args_is_help=True)


def serve(
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port.")] = 8712,
    data: Data = _DEFAULT_DATA,
    cache: Cache = _DEFAULT_CACHE,
    worker: Annotated[bool, typer.Option(help="Run a worker, too.")] = True,
    needs_key: Annotated[
        bool,
        typer.Option("--keys", help="Ask for API keys; needed where others can reach the host."),
    ] = False,
) -> None:
    """Take jobs and answer what-ifs over REST; documentation at /docs."""
    with told_errors(as_json=False):
        from service.api.server import serve as run_server  # noqa: PLC0415  --help must not wait
        from service.settings import ServiceSettings  # noqa: PLC0415

        err.print(f"serving http://{host}:{port}, documentation at /docs", highlight=False)
        run_server(
            host, port, ServiceSettings.read(data, cache), worker=worker, needs_key=needs_key
        )


def worker(data: Data = _DEFAULT_DATA, cache: Cache = _DEFAULT_CACHE) -> None:
    """Do the jobs that the service takes, until told to end."""
    with told_errors(as_json=False):
        from service.logs import set_up_service_logging  # noqa: PLC0415
        from service.settings import ServiceSettings  # noqa: PLC0415
        from service.worker.worker import run_worker  # noqa: PLC0415

        set_up_service_logging()
        run_worker(ServiceSettings.read(data, cache))


def migrate(data: Data = _DEFAULT_DATA, as_json: AsJson = False) -> None:
    """Bring the database up to date.

    `worker`, and `serve` with a worker or on SQLite, do so themselves.
    """
    with told_errors(as_json=as_json):
        from service.records.database import connect, is_current  # noqa: PLC0415
        from service.records.engine import bring_up_to_date  # noqa: PLC0415
        from service.settings import ServiceSettings  # noqa: PLC0415

        engine = connect(ServiceSettings.read(data, default_cache()).database_url)
        bring_up_to_date(engine)
        print_pairs(
            {"database": engine.dialect.name, "up_to_date": is_current(engine)}, as_json=as_json
        )


@keys.command("create")
def create_key(
    tenant: Annotated[str, typer.Argument(help="Whose jobs and profiles the key opens.")],
    name: Annotated[str, typer.Option(help="What the key is for.")] = "",
    scope: Annotated[
        list[str] | None, typer.Option("--scope", help="What it may do; default: everything.")
    ] = None,
    days: Annotated[
        float | None, typer.Option(help="Days until it expires; default: never.")
    ] = None,
    data: Data = _DEFAULT_DATA,
    as_json: AsJson = False,
) -> None:
    """Make an API key and print it, this once."""
    with told_errors(as_json=as_json):
        from service.records.identity import SCOPES  # noqa: PLC0415

        info, key = _keys(data).create(tenant, name, scope or list(SCOPES), days)
        print_pairs(
            {"id": info.id, "tenant": tenant, "scopes": list(info.scopes), "key": key},
            as_json=as_json,
        )


@keys.command("list")
def list_keys(data: Data = _DEFAULT_DATA, as_json: AsJson = False) -> None:
    """List keys; only their hashes are stored, so they are not shown."""
    with told_errors(as_json=as_json):
        found, now = _keys(data).all(), time.time()
        over = {
            info.id
            for info in found
            if info.revoked_at is not None or (info.expires_at or now) < now
        }
        if as_json:
            print_json([asdict(info) | {"in_use": info.id not in over} for info in found])
            return
        for info in found:
            state = "over" if info.id in over else "in use"
            out.print(
                info.id,
                info.tenant,
                info.name,
                " ".join(info.scopes),
                state,
                markup=False,
                highlight=False,
            )


@keys.command("revoke")
def revoke_key(
    key: Annotated[str, typer.Argument(help="Id of the key.")], data: Data = _DEFAULT_DATA
) -> None:
    """Take a key out of use, for good."""
    with told_errors(as_json=False):
        _keys(data).revoke(key)


def quota(
    tenant: Annotated[str, typer.Argument(help="Whose quota.")],
    active_jobs: Annotated[
        int | None, typer.Option(help="Jobs that have not ended, at most.")
    ] = None,
    stored_bytes: Annotated[int | None, typer.Option(help="Bytes of artifacts, at most.")] = None,
    keep_days: Annotated[
        float | None, typer.Option(help="Days that jobs are kept after they ended.")
    ] = None,
    data: Data = _DEFAULT_DATA,
    as_json: AsJson = False,
) -> None:
    """Set what a tenant may have; what is not given is as the environment says for all."""
    with told_errors(as_json=as_json):
        from service.records.submission import Quota, set_quota  # noqa: PLC0415

        set_quota(_database(data), tenant, Quota(active_jobs, stored_bytes, keep_days))
        values = {"active_jobs": active_jobs, "stored_bytes": stored_bytes, "keep_days": keep_days}
        print_pairs({"tenant": tenant, **values}, as_json=as_json)


def _database(data: Path) -> "Engine":
    from service.records.database import connect  # noqa: PLC0415
    from service.records.engine import bring_up_to_date  # noqa: PLC0415
    from service.settings import ServiceSettings  # noqa: PLC0415

    engine = connect(ServiceSettings.read(data, default_cache()).database_url)
    bring_up_to_date(engine)
    return engine


def _keys(data: Path) -> "Keys":
    from service.records.identity import Keys as Found  # noqa: PLC0415

    return Found(_database(data))
