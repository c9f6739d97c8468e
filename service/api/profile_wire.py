"""Profiles and what-ifs in requests and answers."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.request.constraints import (
    BUDGET,
    CONSTRAINTS,
    BudgetOf,
    ConstraintsIn,
    CouplingOption,
    ExactQuestion,
    FrontierQuestion,
    Size,
)
from service.validation import Checked, option


class Question(ExactQuestion):
    """A budget, or the predicted KL divergence that a plan may have at most."""


class AskIn(CouplingOption):
    """Constraints and coupling that questions are asked under."""

    constraints: Annotated[ConstraintsIn, option(CONSTRAINTS)] = ConstraintsIn()


class AllocationsIn(AskIn):
    """Several questions at once."""

    questions: Annotated[
        list[Question], option("Each is answered by itself.", min_length=1, max_length=512)
    ]
    include_plans: Annotated[bool, option("Whether answers hold the fidelity of each layer.")] = (
        False
    )


class FrontierIn(FrontierQuestion, AskIn):
    """A frontier between two budgets; without them, where the profile is valid."""


class CheckIn(AskIn):
    """A plan to be priced."""

    plan: Annotated[dict[str, Any], option("A plan, as `bitwright plan` writes it.")]
    budget: Annotated[Size | None, option(BUDGET)] = None
    budget_of: BudgetOf = None


class DiffIn(Checked):
    """Two plans of one model, and a profile that prices them."""

    before: Annotated[dict[str, Any], option("A plan, as `bitwright plan` writes it.")]
    after: Annotated[dict[str, Any], option("Another plan of the same model.")]
    profile: Annotated[
        str | None,
        option("Digest of a profile that predicts the loss of both plans.", max_length=64),
    ] = None


class LimitOut(BaseModel):
    """What a plan uses of a limit."""

    name: str
    unit: str
    used: float
    most: float
    price_nats_per_token: float


class AllocationOut(BaseModel):
    """The answer to one question; the plan itself where it was asked for."""

    object: Literal["allocation"] = "allocation"
    budget_bytes: int
    weight_bytes: int
    checkpoint_bytes: int | None = None
    unquantized_bytes: int | None = None
    embedding_fidelities: dict[str, str] = {}
    slack_bytes: int
    bits_per_weight: float
    predicted_loss_nats_per_token: float
    bound_nats_per_token: float
    gap: float
    price_nats_per_token_per_byte: float
    limits: list[LimitOut]
    status: str
    solver: str
    notes: list[str]
    bound_bytes: int | None = None
    plan: dict[str, Any] | None = None


class ProblemOut(BaseModel):
    """Why a question has no plan (RFC 9457)."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str


class AnswerOut(BaseModel):
    """One question's allocation, or its problem."""

    allocation: AllocationOut | None = None
    problem: ProblemOut | None = None


class AllocationsOut(BaseModel):
    """Answers in the order of the questions."""

    object: Literal["list"] = "list"
    profile: str
    data: list[AnswerOut]


class ProfileOut(BaseModel):
    """A profile in a few words."""

    object: Literal["profile"] = "profile"
    digest: str
    signal: str
    context: str | None
    context_kl_nats_per_token: float
    layers: int
    fidelities: list[str]
    coupling_rank: int
    smallest_bytes: int
    largest_bytes: int
    trusted_bytes: Annotated[list[int], Field(min_length=2, max_length=2)]
    model_sha256: str
    calibration_sha256: str
    unquantized_bytes: int | None = None


class ProfilesOut(BaseModel):
    """All profiles."""

    object: Literal["list"] = "list"
    data: list[str]
