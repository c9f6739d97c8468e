"""What the handlers of requests have at hand."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

import sqlalchemy as sa
from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer, SecurityScopes

from service.api.metrics import Metrics
from service.errors import NoCredentials, NotAllowed
from service.records.database import connect
from service.records.engine import Client
from service.records.identity import LOCAL, Caller, Keys, Tokens, is_key
from service.records.jobs import JobStore
from service.records.outbox import Outbox
from service.records.profile_owners import Holdings
from service.records.submission import Desk, Quota
from service.settings import ServiceSettings
from service.storage.artifact_store import ArtifactStore
from service.storage.profile_store import ProfileStore


@dataclass(slots=True)
class Backend:
    """Everything behind the API.

    It holds no state of its own but caches, so there may be any number of it.

    Attributes:
        settings: what the environment says.
        needs_key: whether requests must say who sends them.
        is_stopping: whether the process is about to end.
    """

    settings: ServiceSettings
    needs_key: bool
    database: sa.Engine
    artifacts: ArtifactStore
    client: Client
    jobs: JobStore
    desk: Desk
    profiles: ProfileStore
    holdings: Holdings
    outbox: Outbox
    keys: Keys
    tokens: Tokens | None
    metrics: Metrics
    is_stopping: Callable[[], bool] = field(default=lambda: False)

    @classmethod
    def of(cls, settings: ServiceSettings, *, needs_key: bool) -> "Backend":
        """Return the backend of some settings; nothing is connected yet.

        Raises:
            RequestError: a setting cannot be used.
        """
        database = connect(settings.database_url)
        artifacts, client, jobs = (
            ArtifactStore(settings.artifacts),
            Client(database),
            JobStore(database),
        )
        quota = Quota(settings.active_jobs, settings.stored_bytes, settings.keep_days)
        tokens = (
            Tokens(settings.oidc_issuer, settings.oidc_audience) if settings.oidc_issuer else None
        )
        return cls(
            settings, needs_key, database, artifacts, client, jobs, Desk(jobs, client.enqueue, quota), ProfileStore(artifacts),
            Holdings(database), Outbox(database, settings.webhook_targets), Keys(database), tokens, Metrics(database),
        )  # fmt: skip


def backend_of(request: Request) -> Backend:
    """Return the backend of the app."""
    backend: Backend = request.app.state.backend
    return backend


Here = Annotated[Backend, Depends(backend_of)]

_bearer = HTTPBearer(
    auto_error=False, description="An API key, or a token of the OpenID Connect provider."
)


def caller_of(
    backend: Here,
    needed: SecurityScopes,
    sent: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> Caller:
    """Return who sends a request.

    Raises:
        NoCredentials: nobody that is known.
        NotAllowed: they lack a scope.
    """
    if not backend.needs_key and sent is None:
        return LOCAL
    if sent is None:
        raise NoCredentials("this needs an API key: send the header 'Authorization: Bearer KEY'")
    if backend.tokens is not None and not is_key(sent.credentials):
        caller = backend.tokens.caller(sent.credentials)
    else:
        caller = backend.keys.caller(sent.credentials)
    missing = [scope for scope in needed.scopes if scope not in caller.scopes]
    if missing:
        raise NotAllowed(f"this needs the scope {missing[0]!r}")
    return caller


SeesJobs = Annotated[Caller, Security(caller_of, scopes=["jobs:read"])]
MakesJobs = Annotated[Caller, Security(caller_of, scopes=["jobs:write"])]
SeesProfiles = Annotated[Caller, Security(caller_of, scopes=["profiles:read"])]
MakesProfiles = Annotated[Caller, Security(caller_of, scopes=["profiles:write"])]
Solves = Annotated[Caller, Security(caller_of, scopes=["allocations:solve"])]
HasWebhooks = Annotated[Caller, Security(caller_of, scopes=["webhooks:write"])]
SeesMetrics = Annotated[Caller, Security(caller_of, scopes=["metrics:read"])]
