"""What the handlers of requests use."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

import sqlalchemy as sa
from fastapi import Depends, Request

from service.api.metrics import Metrics
from service.records.api_keys import ApiKeys
from service.records.database import connect
from service.records.engine import EngineClient
from service.records.job_service import JobService
from service.records.job_store import JobStore
from service.records.oidc_tokens import OidcTokens
from service.records.outbox import Outbox
from service.records.profile_owners import ProfileOwners
from service.records.quota import Quota
from service.records.webhook_store import WebhookStore
from service.settings import ServiceSettings
from service.storage.artifact_store import ArtifactStore
from service.storage.profile_store import ProfileStore


@dataclass(slots=True)
class Backend:
    """Everything behind the API.

    It holds no state but caches, so any number of processes can serve at once.

    Attributes:
        settings: the process's.
        needs_key: whether requests must carry an API key or a token.
        database: the service's database.
        artifacts: results of jobs.
        engine: asks the durable engine about workflows.
        jobs: reads jobs.
        job_service: submits, cancels, retries and lists them.
        profiles: profiles and their what-ifs.
        profile_owners: which tenant owns which profile.
        webhooks: where events are sent.
        outbox: deliveries of events.
        api_keys: who may send requests.
        oidc_tokens: the same, by tokens of a provider; None accepts none.
        metrics: of this process.
        is_stopping: whether the process is about to end.
    """

    settings: ServiceSettings
    needs_key: bool
    database: sa.Engine
    artifacts: ArtifactStore
    engine: EngineClient
    jobs: JobStore
    job_service: JobService
    profiles: ProfileStore
    profile_owners: ProfileOwners
    webhooks: WebhookStore
    outbox: Outbox
    api_keys: ApiKeys
    oidc_tokens: OidcTokens | None
    metrics: Metrics
    is_stopping: Callable[[], bool] = field(default=lambda: False)

    @classmethod
    def of(cls, settings: ServiceSettings, *, needs_key: bool) -> "Backend":
        """Return the backend for some settings; nothing is connected yet.

        Raises:
            RequestError: a setting cannot be used.
        """
        database = connect(settings.database_url)
        artifacts = ArtifactStore(settings.artifacts)
        engine = EngineClient(database)
        jobs = JobStore(database)
        quota = Quota(settings.active_jobs, settings.stored_bytes, settings.keep_days)
        issuer = settings.oidc_issuer
        return cls(
            settings=settings,
            needs_key=needs_key,
            database=database,
            artifacts=artifacts,
            engine=engine,
            jobs=jobs,
            job_service=JobService(jobs, engine.enqueue, quota),
            profiles=ProfileStore(artifacts),
            profile_owners=ProfileOwners(database),
            webhooks=WebhookStore(database, settings.webhook_targets),
            outbox=Outbox(database, settings.webhook_targets),
            api_keys=ApiKeys(database),
            oidc_tokens=OidcTokens(issuer, settings.oidc_audience) if issuer else None,
            metrics=Metrics(database),
        )


def _backend(request: Request) -> Backend:
    backend: Backend = request.app.state.backend
    return backend


BackendOfApp = Annotated[Backend, Depends(_backend)]
