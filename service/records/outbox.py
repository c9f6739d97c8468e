"""Webhooks: who wants to be told of what, and the deliveries that are due.

Sent at least once, in order for each job.
"""

import json
import random
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from service.errors import DeliveryFailed, TargetRefused, WebhookUnknown
from service.failpoint import failpoint
from service.ids import is_id, new_id
from service.records.database import deliveries, webhooks
from service.webhooks.sending import post
from service.webhooks.signing import delay_before, new_secret, sign
from service.webhooks.targets import check_target

TYPES = (
    "job.queued",
    "job.cancelling",
    "job.succeeded",
    "job.failed",
    "job.cancelled",
    "stage.started",
    "stage.finished",
)
"""Events that can be delivered; progress is not among them."""

PENDING, DELIVERED, GIVEN_UP = "pending", "delivered", "given_up"
AT_ONCE = 8
LEASE_SECONDS = 60
"""For how long a delivery is one worker's; after that it is due again."""

_OK, _REDIRECTED = 200, 300


@dataclass(frozen=True, slots=True)
class Webhook:
    """Where a tenant wants events to be sent, and which."""

    id: str
    tenant: str
    url: str
    secret: str = field(repr=False)
    events: tuple[str, ...]
    created_at: float


def leave_deliveries(
    connection: sa.Connection,
    tenant: str,
    job_id: str | None,
    seq: int,
    event: str,
    data: Mapping[str, Any],
    at: float,
) -> None:
    """Leave an event for every webhook of a tenant that wants it, in the transaction that makes the event."""
    if event not in TYPES:
        return
    for row in connection.execute(sa.select(webhooks).where(webhooks.c.tenant == tenant)):
        if event in row.events:
            _leave(connection, row.id, job_id, seq, event, data, at)


def _leave(
    connection: sa.Connection,
    webhook_id: str,
    job_id: str | None,
    seq: int,
    event: str,
    data: Mapping[str, Any],
    at: float,
) -> str:
    timestamp = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
    body = {"type": event, "timestamp": timestamp, "data": {"job": job_id, "seq": seq, **data}}
    values = {
        "id": new_id("msg"),
        "webhook_id": webhook_id,
        "job_id": job_id,
        "seq": seq,
        "type": event,
        "body": json.dumps(body),
    }
    connection.execute(
        sa.insert(deliveries).values(**values, status=PENDING, attempts=0, next_at=at)
    )
    return values["id"]  # type: ignore[return-value]


class Outbox:
    """Webhooks and their deliveries in the database."""

    def __init__(self, engine: sa.Engine, allowed: Sequence[str] = ()) -> None:
        """Use the tables behind `engine`.

        `allowed` names private targets that may be reached, see `service.webhooks.sending`.
        """
        self._engine, self._allowed = engine, tuple(allowed)

    def add(self, tenant: str, url: str, types: Sequence[str]) -> Webhook:
        """Register a webhook.

        Raises:
            TargetRefused: its address is not one that is sent to.
        """
        check_target(url, self._allowed)
        webhook = Webhook(new_id("wh"), tenant, url, new_secret(), tuple(types), time.time())
        with self._engine.begin() as connection:
            values = {
                "id": webhook.id,
                "tenant": tenant,
                "url": url,
                "secret": webhook.secret,
                "created_at": webhook.created_at,
            }
            connection.execute(sa.insert(webhooks).values(**values, events=list(types)))
        return webhook

    def all(self, tenant: str) -> list[Webhook]:
        """Return a tenant's webhooks, the oldest first."""
        with self._engine.connect() as connection:
            rows = connection.execute(
                sa.select(webhooks).where(webhooks.c.tenant == tenant).order_by(webhooks.c.id)
            )
            return [_webhook(row) for row in rows]

    def get(self, tenant: str, webhook_id: str) -> Webhook:
        """Return a webhook.

        Raises:
            WebhookUnknown: it is not there, or another tenant's.
        """
        row = None
        if is_id(webhook_id):
            with self._engine.connect() as connection:
                mine = webhooks.c.tenant == tenant, webhooks.c.id == webhook_id
                row = connection.execute(sa.select(webhooks).where(*mine)).one_or_none()
        if row is None:
            raise WebhookUnknown(
                f"there is no webhook {webhook_id[:80]!r}; list them, or register one"
            )
        return _webhook(row)

    def remove(self, tenant: str, webhook_id: str) -> None:
        """Remove a webhook with its deliveries.

        Raises:
            WebhookUnknown: it is not there, or another tenant's.
        """
        self.get(tenant, webhook_id)
        with self._engine.begin() as connection:
            connection.execute(sa.delete(deliveries).where(deliveries.c.webhook_id == webhook_id))
            connection.execute(sa.delete(webhooks).where(webhooks.c.id == webhook_id))

    def test(self, tenant: str, webhook_id: str) -> str:
        """Leave a delivery of type `test` for a webhook; return its id."""
        self.get(tenant, webhook_id)
        with self._engine.begin() as connection:
            return _leave(connection, webhook_id, None, 0, "test", {}, time.time())

    def deliveries(self, tenant: str, webhook_id: str, limit: int) -> list[dict[str, Any]]:
        """Return a webhook's newest deliveries."""
        self.get(tenant, webhook_id)
        query = (
            sa.select(deliveries)
            .where(deliveries.c.webhook_id == webhook_id)
            .order_by(deliveries.c.id.desc())
            .limit(limit)
        )
        with self._engine.connect() as connection:
            return [dict(row._mapping) for row in connection.execute(query)]  # noqa: SLF001

    def send_due(self, now: float) -> int:
        """Send what is due, each delivery once now; return how many were tried.

        A delivery waits for those of the same job and webhook before it. What fails is tried again
        after a growing delay, for a day and more, and then given up.
        """
        earlier = deliveries.alias()
        waits = sa.exists().where(
            earlier.c.webhook_id == deliveries.c.webhook_id,
            earlier.c.job_id == deliveries.c.job_id,
            earlier.c.seq < deliveries.c.seq,
            earlier.c.status == PENDING,
        )
        due = sa.select(deliveries).where(
            deliveries.c.status == PENDING, deliveries.c.next_at <= now, ~waits
        )
        with self._engine.connect() as connection:
            rows = list(connection.execute(due.order_by(deliveries.c.next_at).limit(100)))
        if not rows:
            return 0
        with ThreadPoolExecutor(
            AT_ONCE
        ) as pool:  # one that answers slowly keeps none of the others waiting for long
            return sum(pool.map(self._send, rows))

    def forget(self, before: float) -> None:
        """Remove deliveries that were sent or given up before a time."""
        over = deliveries.c.status != PENDING, deliveries.c.next_at < before
        with self._engine.begin() as connection:
            connection.execute(sa.delete(deliveries).where(*over))

    def _send(self, row: Any) -> bool:
        """Claim one delivery and try it; False where another worker has it."""
        claim = sa.update(deliveries).where(
            deliveries.c.id == row.id, deliveries.c.next_at == row.next_at
        )
        with self._engine.begin() as connection:
            if not connection.execute(claim.values(next_at=time.time() + LEASE_SECONDS)).rowcount:
                return False
            hook = connection.execute(
                sa.select(webhooks).where(webhooks.c.id == row.webhook_id)
            ).one_or_none()
        if hook is None:
            return False
        body = row.body.encode()
        failpoint("webhook-before")
        try:
            headers = sign(hook.secret, row.id, datetime.now(UTC), body) | {
                "content-type": "application/json"
            }
            status = post(hook.url, body, headers, self._allowed)
            answer, sent = str(status), _OK <= status < _REDIRECTED
        except (DeliveryFailed, TargetRefused) as error:
            answer, sent = str(error)[:200], False
        failpoint("webhook-sent")
        delay = delay_before(row.attempts + 1, random.random)
        values: dict[str, Any] = {"attempts": row.attempts + 1, "answer": answer}
        values["status"] = DELIVERED if sent else PENDING if delay is not None else GIVEN_UP
        with self._engine.begin() as connection:
            connection.execute(
                sa.update(deliveries)
                .where(deliveries.c.id == row.id)
                .values(**values, next_at=time.time() + (delay or 0))
            )
        return True


def _webhook(row: Any) -> Webhook:
    return Webhook(row.id, row.tenant, row.url, row.secret, tuple(row.events), row.created_at)
