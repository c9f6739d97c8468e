"""Routes of webhooks, to which a tenant has events of its jobs sent.

Messages are signed by the Standard Webhooks scheme.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Query

from service.api.access import WebhookWriter
from service.api.backend import BackendOfApp
from service.api.webhook_wire import DeliveriesOut, DeliveryOut, WebhookIn, WebhookOut, WebhooksOut
from service.records.webhook_store import Webhook
from service.timestamps import rfc3339

router = APIRouter(prefix="/v1/webhooks", tags=["webhooks"])


@router.post("", status_code=201, operation_id="register_webhook")
def register(backend: BackendOfApp, caller: WebhookWriter, body: WebhookIn) -> WebhookOut:
    """Register a webhook.

    The answer has the secret that checks signatures (Standard Webhooks). It cannot be read again.
    """
    webhook = backend.webhooks.add(caller.tenant, body.url, body.events)
    return _webhook_out(webhook, secret=webhook.secret)


@router.get("", operation_id="list_webhooks")
def list_webhooks(backend: BackendOfApp, caller: WebhookWriter) -> WebhooksOut:
    """List all webhooks."""
    webhooks = backend.webhooks.all(caller.tenant)
    return WebhooksOut(data=[_webhook_out(webhook) for webhook in webhooks])


@router.get("/{webhook_id}", operation_id="get_webhook")
def get_webhook(backend: BackendOfApp, caller: WebhookWriter, webhook_id: str) -> WebhookOut:
    """Describe a webhook."""
    return _webhook_out(backend.webhooks.get(caller.tenant, webhook_id))


@router.delete("/{webhook_id}", status_code=204, operation_id="remove_webhook")
def remove(backend: BackendOfApp, caller: WebhookWriter, webhook_id: str) -> None:
    """Remove a webhook. Messages to it that were not sent yet are dropped."""
    backend.webhooks.remove(caller.tenant, webhook_id)


@router.post("/{webhook_id}/test", status_code=202, operation_id="test_webhook")
def test(backend: BackendOfApp, caller: WebhookWriter, webhook_id: str) -> dict[str, str]:
    """Send a message of type `test`. Its delivery shows whether it arrived."""
    webhook = backend.webhooks.get(caller.tenant, webhook_id)
    return {"delivery": backend.outbox.add_test(webhook)}


@router.get("/{webhook_id}/deliveries", operation_id="list_deliveries")
def list_deliveries(
    backend: BackendOfApp,
    caller: WebhookWriter,
    webhook_id: str,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> DeliveriesOut:
    """List the newest messages to a webhook."""
    webhook = backend.webhooks.get(caller.tenant, webhook_id)
    rows = backend.outbox.newest(webhook, limit)
    return DeliveriesOut(data=[_delivery_out(row) for row in rows])


def _webhook_out(webhook: Webhook, secret: str | None = None) -> WebhookOut:
    return WebhookOut(
        id=webhook.id,
        url=webhook.url,
        events=list(webhook.events),
        created_at=rfc3339(webhook.created_at),
        secret=secret,
    )


def _delivery_out(row: dict[str, Any]) -> DeliveryOut:
    names = ("id", "type", "job_id", "status", "attempts", "answer")
    return DeliveryOut(
        **{name: row[name] for name in names},
        next_at=rfc3339(row["next_at"]),
    )
