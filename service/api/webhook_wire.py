"""Webhooks and their deliveries in requests and answers."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from service.validation import Checked, option

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
    """A webhook. Its secret is in the answer to its registration, and in no other."""

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
