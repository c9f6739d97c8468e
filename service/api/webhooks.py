"""Webhooks: where a tenant wants to be told what happens to its jobs.

Signed by the Standard Webhooks scheme.
"""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from service.api.access import WebhookWriter
from service.api.backend import BackendOfApp
from service.api.wire import moment
from service.records.webhook_store import Webhook
from service.validation import Checked, option

router = APIRouter(prefix="/v1/webhooks", tags=["webhooks"])

EventType = Literal[
    "job.queued",
    "job.cancelling",
    "job.succeeded",
    "job.failed",
    "job.cancelled",
    "stage.started",
    "stage.finished",
]


class WebhookIn(Checked):
    """Where events are to be sent, and which."""

    url: Annotated[
        str,
        option(
            "Address that events are sent to.",
            example="https://example.com/hooks/bitwright",
            min_length=1,
            max_length=2000,
            repr=False,
        ),
    ]
    events: list[EventType] = Field(["job.succeeded", "job.failed"], min_length=1, max_length=16)


class WebhookOut(BaseModel):
    """A webhook; its secret is shown when it is registered, and never again."""

    object: Literal["webhook"] = "webhook"
    id: str
    url: str
    events: list[str]
    created_at: str
    secret: str | None = None


class WebhooksOut(BaseModel):
    """All webhooks of a tenant."""

    object: Literal["list"] = "list"
    data: list[WebhookOut]


class DeliveryOut(BaseModel):
    """One message to a webhook, which may have been tried several times."""

    object: Literal["delivery"] = "delivery"
    id: str
    type: str
    job_id: str | None
    status: Literal["pending", "delivered", "given_up"]
    attempts: int
    answer: str | None
    next_at: str


class DeliveriesOut(BaseModel):
    """The newest messages to a webhook."""

    object: Literal["list"] = "list"
    data: list[DeliveryOut]


@router.post("", status_code=201, operation_id="register_webhook")
def register(backend: BackendOfApp, caller: WebhookWriter, body: WebhookIn) -> WebhookOut:
    """Register a webhook. Its secret checks signatures (Standard Webhooks).

    It is not shown again.
    """
    webhook = backend.webhooks.add(caller.tenant, body.url, body.events)
    return _out(webhook, secret=webhook.secret)


@router.get("", operation_id="list_webhooks")
def list_webhooks(backend: BackendOfApp, caller: WebhookWriter) -> WebhooksOut:
    """List all webhooks."""
    return WebhooksOut(data=[_out(webhook) for webhook in backend.webhooks.all(caller.tenant)])


@router.get("/{webhook_id}", operation_id="get_webhook")
def get_webhook(backend: BackendOfApp, caller: WebhookWriter, webhook_id: str) -> WebhookOut:
    """Describe a webhook."""
    return _out(backend.webhooks.get(caller.tenant, webhook_id))


@router.delete("/{webhook_id}", status_code=204, operation_id="remove_webhook")
def remove(backend: BackendOfApp, caller: WebhookWriter, webhook_id: str) -> None:
    """Remove a webhook; messages to it that were not sent yet are dropped."""
    backend.webhooks.remove(caller.tenant, webhook_id)


@router.post("/{webhook_id}/test", status_code=202, operation_id="test_webhook")
def test(backend: BackendOfApp, caller: WebhookWriter, webhook_id: str) -> dict[str, str]:
    """Send a message of type `test`; its delivery tells how it went."""
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
    return DeliveriesOut(data=[_delivery(row) for row in backend.outbox.newest(webhook, limit)])


def _out(webhook: Webhook, secret: str | None = None) -> WebhookOut:
    return WebhookOut(
        id=webhook.id,
        url=webhook.url,
        events=list(webhook.events),
        created_at=moment(webhook.created_at),
        secret=secret,
    )


def _delivery(row: dict[str, Any]) -> DeliveryOut:
    values = {name: row[name] for name in ("id", "type", "job_id", "status", "attempts", "answer")}
    return DeliveryOut(**values, next_at=moment(row["next_at"]))
