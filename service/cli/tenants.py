"""The commands that change the service's database: migrate, quota and keys."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from sqlalchemy import Engine

from service.cli.console import out, print_json, print_pairs
from service.cli.parameters import AsJson, Data
from service.records.api_keys import ApiKeys
from service.records.database import connect, is_current
from service.records.engine import bring_up_to_date
from service.records.identity import SCOPES
from service.records.quota import Quota, set_quota
from service.settings import ServiceSettings, default_data

DATA = default_data()

keys = App(name="keys", help="API keys of the service.")


def migrate(*, data: Data = DATA, as_json: AsJson = False) -> None:
    """Bring the database to the current schema.

    `worker`, and `serve` with a worker or on SQLite, do so themselves.
    """
    engine = _database(data)
    state = {"database": engine.dialect.name, "up_to_date": is_current(engine)}
    print_pairs(state, as_json=as_json)


def quota(
    tenant: Annotated[str, Parameter(help="Name of the tenant.")],
    /,
    *,
    active_jobs: Annotated[
        int | None, Parameter(help="Largest number of jobs that have not ended.")
    ] = None,
    stored_bytes: Annotated[
        int | None, Parameter(help="Largest number of bytes of artifacts.")
    ] = None,
    keep_days: Annotated[
        float | None, Parameter(help="Days that jobs are kept after they ended.")
    ] = None,
    data: Data = DATA,
    as_json: AsJson = False,
) -> None:
    """Set the limits of a tenant; those that are not given are as in the settings."""
    set_quota(_database(data), tenant, Quota(active_jobs, stored_bytes, keep_days))
    values = {"active_jobs": active_jobs, "stored_bytes": stored_bytes, "keep_days": keep_days}
    print_pairs({"tenant": tenant, **values}, as_json=as_json)


@keys.command(name="create")
def create_key(
    tenant: Annotated[str, Parameter(help="Tenant whose jobs and profiles the key opens.")],
    /,
    *,
    name: Annotated[str, Parameter(help="What the key is for.")] = "",
    scope: Annotated[
        list[str] | None, Parameter(help="What the key permits; by default everything.")
    ] = None,
    days: Annotated[
        float | None, Parameter(help="Days until the key expires; by default it does not.")
    ] = None,
    data: Data = DATA,
    as_json: AsJson = False,
) -> None:
    """Create an API key and print it. It is not stored and cannot be shown again."""
    info, key = ApiKeys(_database(data)).create(tenant, name, scope or list(SCOPES), days)
    row = {"id": info.id, "tenant": tenant, "scopes": list(info.scopes), "key": key}
    print_pairs(row, as_json=as_json)


@keys.command(name="list")
def list_keys(*, data: Data = DATA, as_json: AsJson = False) -> None:
    """List the keys. Only their hashes are stored, so the keys themselves are not shown."""
    found = ApiKeys(_database(data)).all()
    now = time.time()
    over = {
        info.id for info in found if info.revoked_at is not None or (info.expires_at or now) < now
    }
    if as_json:
        print_json([asdict(info) | {"in_use": info.id not in over} for info in found])
        return
    for info in found:
        state = "over" if info.id in over else "in use"
        line = [info.id, info.tenant, info.name, " ".join(info.scopes), state]
        out.print(*line, markup=False, highlight=False)


@keys.command(name="revoke")
def revoke_key(
    key: Annotated[str, Parameter(help="Id of the key.")], /, *, data: Data = DATA
) -> None:
    """Revoke a key, for good."""
    ApiKeys(_database(data)).revoke(key)


def _database(data: Path) -> Engine:
    engine = connect(ServiceSettings.read(data=data).database_url)
    bring_up_to_date(engine)
    return engine
