"""Jobs as they go over the wire."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from service.request.constraints import BUDGET, CONSTRAINTS, BudgetOf, ConstraintsIn, Size
from service.request.options import WHOLE_FILE, RunOptions
from service.validation import Checked, invalid, option

LabelName = Annotated[
    str,
    option(
        values="1 to 63 of letters, digits, '_', '.' and '-'", pattern=r"^[A-Za-z0-9_.-]{1,63}$"
    ),
]
LabelValue = Annotated[str, Field(max_length=200, pattern=r"^[^\x00]*$")]
Digest = Annotated[str, option(values="64 hexadecimal digits", pattern=r"^[0-9a-f]{64}$")]
JobName = Annotated[str, option("What the job is called.", max_length=200, pattern=r"^[^\x00]*$")]
Labels = dict[LabelName, LabelValue]
Priority = Annotated[
    Literal["high", "normal", "low"], option("Which of several queued jobs is run first.")
]

LABELS = "Names and values that jobs can be listed by."


class JobIn(RunOptions):
    """A job to be submitted."""

    name: JobName = ""
    labels: Annotated[Labels, option(LABELS, max_length=32)] = {}
    priority: Priority = "normal"
    profile: Annotated[
        Digest | None,
        option("Digest of a profile of this model; without it, one is measured."),
    ] = None

    @model_validator(mode="after")
    def _measures_what_it_checks(self) -> "JobIn":
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
    """A new job from an old one's profile, with another budget or other constraints.

    What is not given is as in the old job.
    """

    budget: Annotated[Size | None, option(BUDGET)] = None
    budget_of: BudgetOf = None
    whole_file: Annotated[bool | None, option(WHOLE_FILE, deprecated=True)] = None
    constraints: Annotated[ConstraintsIn | None, option(CONSTRAINTS)] = None
    name: JobName = ""
    labels: Annotated[Labels | None, option(LABELS, max_length=32)] = None
    priority: Priority = "normal"


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
