"""Jobs as they go over the wire."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from service.api.wire import ConstraintsIn, Strict
from service.request import RunRequest, make_request

Name = Annotated[str, Field(max_length=1000)]
Count = Annotated[int, Field(ge=0, le=1_000_000)]
LabelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,63}$")]
LabelValue = Annotated[str, Field(max_length=200, pattern=r"^[^\x00]*$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class JobOptions(Strict):
    """What a job does: the options of `bitwright run`, by the same names and with the same defaults."""

    model: Annotated[
        str,
        Field(
            max_length=1000, min_length=1, examples=["demo/model/SmolLM2-135M-Instruct.Q4_1.gguf"]
        ),
    ]
    budget: Annotated[str, Field(max_length=40, examples=["2.5bpw"])]
    whole_file: bool = False
    embeddings: Annotated[str, Field(max_length=40)] = "auto"
    calibration: Name = "builtin:calibration"
    evaluation: Name = "builtin:evaluation"
    calibration_windows: Count = 8
    evaluation_windows: Count = 16
    tokens: Count = 512
    probe_windows: Count | None = None
    probe_tokens: Count | None = None
    check_plans: Count = 0
    guard_windows: Count = 8
    group_size: Annotated[int, Field(ge=1, le=65536)] | None = None
    signal: Annotated[str, Field(max_length=40)] = "integral"
    coupling: Annotated[str, Field(max_length=40)] = "full"
    context: Annotated[str, Field(max_length=40)] = "uniform"
    effort: Annotated[str, Field(max_length=40)] = "balanced"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: Annotated[str, Field(max_length=40)] = "auto"
    constraints: ConstraintsIn = ConstraintsIn()

    def request(self, model: Callable[[str], str], text: Callable[[str], str]) -> RunRequest:
        """Return the request, with names of models and texts replaced by what `model` and `text` say.

        Raises:
            ServiceError, AllocatorError: an option is out of range, or a name is refused.
        """
        values = self.model_dump(
            exclude={"model", "budget", "calibration", "evaluation", "constraints"}
        )
        return make_request(
            model(self.model),
            self.budget,
            calibration=text(self.calibration),
            evaluation=text(self.evaluation),
            constraints=self.constraints.constraints(),
            **values,
        )


class JobIn(JobOptions):
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
            raise ValueError(
                "check_plans measures a profile that the job made itself; leave one of both out"
            )
        return self

    def options(self) -> JobOptions:
        """Return what the job does, without what it is called."""
        return JobOptions(**{name: getattr(self, name) for name in JobOptions.model_fields})


class ForkIn(Strict):
    """A new job from an old one's profile, with another budget or other constraints."""

    budget: Annotated[str, Field(max_length=40, examples=["3bpw"])] | None = None
    whole_file: bool | None = None
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
