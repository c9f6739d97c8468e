"""Jobs as they go over the wire."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from service.request.constraints import BUDGET, BudgetOf, ConstraintsIn, Size
from service.request.options import RunOptions
from service.validation import Checked, invalid, option

LabelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,63}$")]
LabelValue = Annotated[str, Field(max_length=200, pattern=r"^[^\x00]*$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class JobIn(RunOptions):
    """A job to be submitted."""

    name: Annotated[str, Field(max_length=200, pattern=r"^[^\x00]*$")] = ""
    labels: dict[LabelName, LabelValue] = Field({}, max_length=32)
    priority: Literal["high", "normal", "low"] = "normal"
    profile: Digest | None = Field(
        None, description="Digest of a profile of this model; without it, one is measured."
    )

    @model_validator(mode="after")
    def _checks_need_a_profile_of_ones_own(self) -> "JobIn":
        if self.profile is not None and self.check_plans:
            raise invalid(
                "check plans measures random plans for the profile that the job measures; give "
                "either check plans or a profile"
            )
        return self

    def options(self) -> RunOptions:
        """Return what the job does, without what it is called."""
        return RunOptions(**{name: getattr(self, name) for name in RunOptions.model_fields})


class ForkIn(Checked):
    """A new job from an old one's profile, with another budget or other constraints."""

    budget: Annotated[Size | None, option(BUDGET)] = None
    budget_of: BudgetOf = None
    whole_file: Annotated[bool | None, Field(deprecated=True)] = None
    constraints: ConstraintsIn | None = None
    name: Annotated[str, Field(max_length=200, pattern=r"^[^\x00]*$")] = ""
    labels: Annotated[dict[LabelName, LabelValue], Field(max_length=32)] | None = None
    priority: Literal["high", "normal", "low"] = "normal"


class StageOut(BaseModel):
    """One stage of a job."""

    stage: str
    attempt: int
    worker: str
    starts: int
    started_at: str
    finished_at: str | None


class JobOut(BaseModel):
    """A job."""

    object: Literal["job"] = "job"
    id: str
    name: str
    status: Literal["queued", "running", "cancelling", "succeeded", "failed", "cancelled"]
    stage: str | None
    progress: dict[str, Any] | None
    labels: dict[str, str]
    priority: Literal["high", "normal", "low"]
    attempt: int
    version: int
    parent: str | None
    profile: str | None
    created_at: str
    started_at: str | None
    finished_at: str | None
    stages: list[StageOut] | None = None
    request: dict[str, Any]
    result: dict[str, Any] | None
    error: dict[str, Any] | None


class JobsOut(BaseModel):
    """A page of jobs, the newest first."""

    object: Literal["list"] = "list"
    data: list[JobOut]
    has_more: bool
    first_id: str | None
    last_id: str | None


class EventOut(BaseModel):
    """Something that happened to a job."""

    object: Literal["event"] = "event"
    seq: int
    at: str
    type: str
    data: dict[str, Any]


class EventsOut(BaseModel):
    """A page of events, the oldest first."""

    object: Literal["list"] = "list"
    data: list[EventOut]
    has_more: bool
    last_seq: int


class ArtifactOut(BaseModel):
    """A file that a job made."""

    object: Literal["artifact"] = "artifact"
    name: str
    size_bytes: int
    sha256: str
    url: str


class ArtifactsOut(BaseModel):
    """All files that a job made."""

    object: Literal["list"] = "list"
    data: list[ArtifactOut]
