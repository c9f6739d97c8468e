"""Deliveries of events to webhooks: sent at least once, and in order for each job."""

import json
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from service.errors import DeliveryFailed, TargetRefused
from service.failpoint import failpoint
from service.ids import new_id
from service.records.job import Event
from service.records.tables import deliveries, webhooks
from service.records.webhook_store import Webhook
from service.timestamps import rfc3339
from service.webhooks.sending import post
from service.webhooks.signing import delay_before, sign

EVENT_TYPES = (
    "job.queued",
    "job.cancelling",
    "job.succeeded",
    "job.failed",
    "job.cancelled",
    "stage.started",
    "stage.finished",
)
"""Events that can be delivered; progress is not among them."""

PENDING = "pending"
DELIVERED = "delivered"
GIVEN_UP = "given_up"

SENT_AT_ONCE = 8
LEASE_SECONDS = 60
"""How long a delivery belongs to the worker that claimed it; after that it is due again."""

_MAX_DUE = 100
_OK = 200
_REDIRECTED = 300


def add_deliveries(connection: sa.Connection, tenant: str, job_id: str, event: Event) -> None:
    """Add a delivery of an event for every webhook of a tenant that subscribed to it.

    It is part of the transaction that records the event.
    """
    if event.type not in EVENT_TYPES:
        return
    for row in connection.execute(sa.select(webhooks).where(webhooks.c.tenant == tenant)):
        if event.type in row.events:
            _insert(connection, row.id, job_id, event)


def _insert(connection: sa.Connection, webhook_id: str, job_id: str | None, event: Event) -> str:
    """Insert a delivery, and return its id."""
    body = {
        "type": event.type,
        "timestamp": rfc3339(event.at),
        "data": {"job": job_id, "seq": event.seq, **event.data},
    }
    delivery_id = new_id("msg")
    values = {
        "id": delivery_id,
        "webhook_id": webhook_id,
        "job_id": job_id,
        "seq": event.seq,
        "type": event.type,
        "body": json.dumps(body),
        "status": PENDING,
        "attempts": 0,
        "next_at": event.at,
    }
    connection.execute(sa.insert(deliveries).values(**values))
    return delivery_id


class Outbox:
    """Deliveries in the database."""

    def __init__(self, engine: sa.Engine, allowed: Sequence[str] = ()) -> None:
        """Use the tables behind `engine`.

        `allowed` names private targets, see `service.webhooks.targets.check_target`.
        """
        self._engine = engine
        self._allowed = tuple(allowed)

    def add_test(self, webhook: Webhook) -> str:
        """Add a delivery of type `test` to a webhook, and return its id."""
        event = Event(0, time.time(), "test", {})
        with self._engine.begin() as connection:
            return _insert(connection, webhook.id, None, event)

    def newest(self, webhook: Webhook, limit: int) -> list[dict[str, Any]]:
        """Return the newest deliveries to a webhook."""
        query = (
            sa.select(deliveries)
            .where(deliveries.c.webhook_id == webhook.id)
            .order_by(deliveries.c.id.desc())
            .limit(limit)
        )
        with self._engine.connect() as connection:
            return [dict(row._mapping) for row in connection.execute(query)]  # noqa: SLF001

    def send_due(self, now: float) -> int:
        """Try each delivery that is due once, and return how many were tried.

        A delivery waits for the earlier ones of the same job to the same webhook. A failed one is
        tried again after a growing delay, for more than a day, and then given up.
        """
        earlier = deliveries.alias()
        has_earlier = sa.exists().where(
            earlier.c.webhook_id == deliveries.c.webhook_id,
            earlier.c.job_id == deliveries.c.job_id,
            earlier.c.seq < deliveries.c.seq,
            earlier.c.status == PENDING,
        )
        due = (
            sa.select(deliveries)
            .where(deliveries.c.status == PENDING, deliveries.c.next_at <= now, ~has_earlier)
            .order_by(deliveries.c.next_at)
            .limit(_MAX_DUE)
        )
        with self._engine.connect() as connection:
            rows = list(connection.execute(due))
        if not rows:
            return 0
        # in several threads, so that a slow receiver does not delay the others for long
        with ThreadPoolExecutor(SENT_AT_ONCE) as pool:
            return sum(pool.map(self._try, rows))

    def remove_before(self, time_before: float) -> None:
        """Remove deliveries that were delivered or given up before a time."""
        is_over = deliveries.c.status != PENDING, deliveries.c.next_at < time_before
        with self._engine.begin() as connection:
            connection.execute(sa.delete(deliveries).where(*is_over))

    def _try(self, row: Any) -> bool:
        """Claim one delivery and try it; return False where another worker has it."""
        webhook = self._claim(row)
        if webhook is None:
            return False
        failpoint("webhook-before")
        is_delivered, answer = self._send(webhook, row)
        failpoint("webhook-sent")
        delay = delay_before(row.attempts + 1, random.random)
        undelivered = GIVEN_UP if delay is None else PENDING
        values = {
            "attempts": row.attempts + 1,
            "answer": answer,
            "status": DELIVERED if is_delivered else undelivered,
            "next_at": time.time() + (delay or 0),
        }
        update = sa.update(deliveries).where(deliveries.c.id == row.id).values(**values)
        with self._engine.begin() as connection:
            connection.execute(update)
        return True

    def _claim(self, row: Any) -> Webhook | None:
        """Return a delivery's webhook; None where another worker has the delivery."""
        unclaimed = deliveries.c.id == row.id, deliveries.c.next_at == row.next_at
        lease = sa.update(deliveries).where(*unclaimed)
        query = sa.select(webhooks).where(webhooks.c.id == row.webhook_id)
        with self._engine.begin() as connection:
            if not connection.execute(lease.values(next_at=time.time() + LEASE_SECONDS)).rowcount:
                return None
            webhook = connection.execute(query).one_or_none()
        return None if webhook is None else Webhook.of(webhook)

    def _send(self, webhook: Webhook, row: Any) -> tuple[bool, str]:
        """Send a delivery; return whether it was accepted, and the status or the error."""
        body = row.body.encode()
        try:
            headers = sign(webhook.secret, row.id, datetime.now(UTC), body)
            headers["content-type"] = "application/json"
            status = post(webhook.url, body, headers, self._allowed)
        except (DeliveryFailed, TargetRefused) as error:
            return False, str(error)[:200]
        return _OK <= status < _REDIRECTED, str(status)
