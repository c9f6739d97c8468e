"""Webhooks: where a tenant wants events of its jobs to be sent, and which."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from service.errors import WebhookUnknown
from service.ids import is_id, new_id
from service.records.tables import deliveries, webhooks
from service.webhooks.signing import new_secret
from service.webhooks.targets import check_target


@dataclass(frozen=True, slots=True)
class Webhook:
    """Where a tenant wants events to be sent, and which.

    Attributes:
        id: names the webhook.
        tenant: whose jobs it is about.
        url: where events are sent.
        secret: signs them.
        events: types of the events that are sent.
        created_at: seconds since 1970, UTC.
    """

    id: str
    tenant: str
    url: str
    secret: str = field(repr=False)
    events: tuple[str, ...]
    created_at: float

    @classmethod
    def of(cls, row: Any) -> "Webhook":
        """Return the webhook of a row."""
        return cls(row.id, row.tenant, row.url, row.secret, tuple(row.events), row.created_at)


class WebhookStore:
    """Webhooks in the database."""

    def __init__(self, engine: sa.Engine, allowed: Sequence[str] = ()) -> None:
        """Use the tables behind `engine`.

        `allowed` names private targets, see `service.webhooks.targets.check_target`.
        """
        self._engine = engine
        self._allowed = tuple(allowed)

    def add(self, tenant: str, url: str, events: Sequence[str]) -> Webhook:
        """Register a webhook.

        Raises:
            TargetRefused: nothing may be sent to its address.
        """
        check_target(url, self._allowed)
        values = {
            "id": new_id("wh"),
            "tenant": tenant,
            "url": url,
            "secret": new_secret(),
            "events": list(events),
            "created_at": time.time(),
        }
        insert = sa.insert(webhooks).values(**values).returning(*webhooks.c)
        with self._engine.begin() as connection:
            return Webhook.of(connection.execute(insert).one())

    def all(self, tenant: str) -> list[Webhook]:
        """Return a tenant's webhooks, the oldest first."""
        query = sa.select(webhooks).where(webhooks.c.tenant == tenant).order_by(webhooks.c.id)
        with self._engine.connect() as connection:
            return [Webhook.of(row) for row in connection.execute(query)]

    def get(self, tenant: str, webhook_id: str) -> Webhook:
        """Return a webhook.

        Raises:
            WebhookUnknown: it does not exist, or is another tenant's.
        """
        row = None
        if is_id(webhook_id):
            own = webhooks.c.tenant == tenant, webhooks.c.id == webhook_id
            with self._engine.connect() as connection:
                row = connection.execute(sa.select(webhooks).where(*own)).one_or_none()
        if row is None:
            raise WebhookUnknown(
                f"there is no webhook {webhook_id[:80]!r}; list them, or register one"
            )
        return Webhook.of(row)

    def remove(self, tenant: str, webhook_id: str) -> None:
        """Remove a webhook with its deliveries.

        Raises:
            WebhookUnknown: it does not exist, or is another tenant's.
        """
        self.get(tenant, webhook_id)
        with self._engine.begin() as connection:
            connection.execute(sa.delete(deliveries).where(deliveries.c.webhook_id == webhook_id))
            connection.execute(sa.delete(webhooks).where(webhooks.c.id == webhook_id))
