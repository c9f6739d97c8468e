"""Routes of profiles, which never change, and of the what-ifs that they answer at once."""

import time
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request, Response, UploadFile
from fastapi.responses import StreamingResponse

from allocator.answers.answer import answer_budget, answer_loss
from allocator.answers.difference import compare_plans
from allocator.answers.frontier import budgets_between, frontier
from allocator.answers.layer_budget import layer_bytes
from allocator.answers.pricing import price_plan
from allocator.answers.whatif import WhatIf
from allocator.demands.budget import Budget
from allocator.errors import AllocatorError
from allocator.profile import Profile
from quantizer.plans.plan import Plan
from service.api import problems
from service.api.access import ProfileReader, ProfileWriter, Solver
from service.api.backend import BackendOfApp
from service.api.downloads import FOREVER, download
from service.api.profile_wire import (
    AllocationOut,
    AllocationsIn,
    AllocationsOut,
    AnswerOut,
    CheckIn,
    DiffIn,
    FrontierIn,
    ProblemOut,
    ProfileOut,
    ProfilesOut,
    Question,
)
from service.errors import BodyTooLarge
from service.problems import problem_of
from service.report.frontier_table import FrontierTable, frontier_span

MAX_FILE_BYTES = 256 * 2**20
"""Largest file of a profile that is accepted."""

router = APIRouter(prefix="/v1", tags=["profiles"])


@router.post("/profiles", status_code=201, operation_id="import_profile")
def import_profile(
    backend: BackendOfApp,
    caller: ProfileWriter,
    response: Response,
    head: UploadFile,
    arrays: UploadFile,
) -> ProfileOut:
    """Import a profile that `bitwright profile` wrote.

    `head` is its file profile.json, `arrays` its file profile.npz.
    """
    digest, is_new = backend.profiles.add(_bounded(head), _bounded(arrays))
    backend.profile_owners.add(caller.tenant, digest)
    response.headers["Location"] = f"/v1/profiles/{digest}"
    response.status_code = 201 if is_new else 200
    return _summary(digest, backend.profiles.get(digest))


@router.get("/profiles", operation_id="list_profiles")
def list_profiles(backend: BackendOfApp, caller: ProfileReader) -> ProfilesOut:
    """List the digests of all profiles."""
    return ProfilesOut(data=backend.profile_owners.all(caller.tenant))


@router.get("/profiles/{digest}", operation_id="get_profile", response_model=ProfileOut)
def get_profile(
    backend: BackendOfApp,
    caller: ProfileReader,
    digest: str,
    response: Response,
    if_none_match: Annotated[str | None, Header()] = None,
) -> ProfileOut | Response:
    """Describe a profile; it never changes, so its digest is its entity tag."""
    backend.profile_owners.check(caller.tenant, digest)
    headers = {"ETag": f'"{digest}"', "Cache-Control": FOREVER}
    if if_none_match is not None and headers["ETag"] in if_none_match:
        return Response(status_code=304, headers=headers)
    response.headers.update(headers)
    return _summary(digest, backend.profiles.get(digest))


@router.get(
    "/profiles/{digest}/{name}", operation_id="export_profile", response_class=StreamingResponse
)
def export_profile(
    backend: BackendOfApp, caller: ProfileReader, digest: str, name: str, request: Request
) -> Response:
    """Export one of the two files of a profile: profile.json or profile.npz. Ranges are served."""
    backend.profile_owners.check(caller.tenant, digest)
    place, artifact = backend.profiles.find(digest, name)
    return download(backend.artifacts, place, artifact, request)


@router.delete("/profiles/{digest}", status_code=204, operation_id="delete_profile")
def delete_profile(backend: BackendOfApp, caller: ProfileWriter, digest: str) -> None:
    """Delete a profile. Jobs that used it keep their results."""
    if backend.profile_owners.remove(caller.tenant, digest):
        backend.profiles.remove(digest)


@router.post(
    "/profiles/{digest}/allocations",
    operation_id="ask",
    response_model=AllocationsOut,
    response_model_exclude_none=True,
    responses={
        422: problems.DOCUMENTED
        | {"description": "No question has a plan; the problem of the first one."}
    },
)
def ask(
    backend: BackendOfApp, caller: Solver, digest: str, body: AllocationsIn, response: Response
) -> AllocationsOut | Response:
    """Answer what-ifs, in milliseconds.

    Each gets its best plan, with the bound, the gap, and the price of a byte.

    A question without a plan gets a problem. If no question has a plan, the answer is the problem
    of the first one.
    """
    backend.profile_owners.check(caller.tenant, digest)
    start = time.perf_counter()
    answers = []
    with backend.profiles.whatif(digest, body.coupling, body.constraints.constraints()) as whatif:
        ready = time.perf_counter()
        for question in body.questions:
            try:
                answers.append(
                    AnswerOut(allocation=_answer(whatif, question, include_plan=body.include_plans))
                )
            except AllocatorError as error:
                answers.append(AnswerOut(problem=ProblemOut(**problem_of(error))))
    solved = time.perf_counter()
    backend.metrics.solve_seconds.observe(solved - ready)
    timing = f"ready;dur={1e3 * (ready - start):.2f}, solve;dur={1e3 * (solved - ready):.2f}"
    if all(answer.problem is not None for answer in answers):
        first = answers[0].problem
        return problems.respond(first.model_dump() if first else {}, {"Server-Timing": timing})
    response.headers["Server-Timing"] = timing
    return AllocationsOut(profile=digest, data=answers)


@router.post("/profiles/{digest}/frontier", operation_id="frontier")
def get_frontier(
    backend: BackendOfApp, caller: Solver, digest: str, body: FrontierIn
) -> dict[str, Any]:
    """Return the best plans by size, with the convex hull and its knees marked."""
    backend.profile_owners.check(caller.tenant, digest)
    with backend.profiles.whatif(digest, body.coupling, body.constraints.constraints()) as whatif:
        ends = [
            None
            if text is None
            else layer_bytes(whatif.profile, Budget.parse(text), body.budget_of)
            for text in (body.low, body.high)
        ]
        points = frontier(whatif, budgets_between(*frontier_span(whatif, *ends), body.points))
        return FrontierTable.of(whatif.profile, points).to_json()


@router.post("/profiles/{digest}/plan-checks", operation_id="check_plan")
def check_plan(backend: BackendOfApp, caller: Solver, digest: str, body: CheckIn) -> dict[str, Any]:
    """Evaluate a plan, such as one that a person edited.

    Return its bytes, its predicted loss, and the ties, rules and limits that it violates.
    """
    backend.profile_owners.check(caller.tenant, digest)
    plan = Plan.from_json(body.plan)
    with backend.profiles.whatif(digest, body.coupling, body.constraints.constraints()) as whatif:
        most = (
            None
            if body.budget is None
            else layer_bytes(whatif.profile, Budget.parse(body.budget), body.budget_of, plan)
        )
        return price_plan(whatif, plan.without_embeddings, most).to_json()


@router.post("/plan-diffs", operation_id="diff_plans")
def diff_plans(backend: BackendOfApp, caller: Solver, body: DiffIn) -> dict[str, Any]:
    """Compare two plans of one model; with a profile, also their predicted losses."""
    if body.profile is not None:
        backend.profile_owners.check(caller.tenant, body.profile)
    profile = None if body.profile is None else backend.profiles.get(body.profile)
    return compare_plans(
        Plan.from_json(body.before).without_embeddings,
        Plan.from_json(body.after).without_embeddings,
        profile,
    ).to_json()


def _answer(whatif: WhatIf, question: Question, *, include_plan: bool) -> AllocationOut:
    if question.budget is not None:
        answer = answer_budget(whatif, Budget.parse(question.budget), question.budget_of)
    else:
        answer = answer_loss(whatif, question.max_kl or 0.0)
    document = answer.to_json()
    return AllocationOut(
        **{name: document[name] for name in AllocationOut.model_fields if name in document},
        plan=document if include_plan else None,
    )


def _summary(digest: str, profile: Profile) -> ProfileOut:
    sizes = profile.weight_bytes
    return ProfileOut(
        digest=digest,
        signal=profile.signal,
        context=None if profile.context is None else profile.fidelities[profile.context].name,
        context_kl_nats_per_token=profile.context_loss,
        layers=len(profile.layers),
        fidelities=[fidelity.name for fidelity in profile.fidelities],
        coupling_rank=len(profile.factor),
        smallest_bytes=int(sizes.min(axis=1).sum()),
        largest_bytes=int(sizes.max(axis=1).sum()),
        trusted_bytes=list(profile.budget_range),
        model_sha256=profile.model_sha256,
        calibration_sha256=profile.calibration_sha256,
        unquantized_bytes=profile.unquantized.total_bytes if profile.unquantized else None,
    )


def _bounded(upload: UploadFile) -> bytes:
    data = upload.file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise BodyTooLarge(f"a file of a profile has more than {MAX_FILE_BYTES} bytes")
    return data
