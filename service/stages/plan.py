"""The stage that solves for a plan."""

from dataclasses import asdict

from allocator import allocate as solver
from allocator.answers.allocation import Allocation
from allocator.demands.constraints import Constraints
from allocator.profile import Profile
from service.request.request import RunRequest
from service.storage.disk import _write
from service.storage.stage_store import StageKey, StageStore


def plan(
    store: StageStore, measured: Profile, budget_bytes: int, constraints: Constraints
) -> Allocation:
    """Solve for the plan of a budget.

    Solving takes less time than looking it up; the plan is kept as a record of the run.
    """
    allocation = solver.allocate(measured, budget_bytes, constraints)
    inputs = {
        "profile": measured.digest,
        "budget_bytes": budget_bytes,
        "constraints": asdict(constraints),
        "method": solver.METHOD,
    }
    store.get(
        StageKey("plan", inputs), lambda folder, _: _write(folder / "plan.json", allocation.dumps())
    )
    return allocation


def plans_of(
    profile: Profile, request: RunRequest, budget_bytes: int, store: StageStore
) -> dict[str, Allocation]:
    """Return the plan with the coupling that was asked for and, where it differs, the additive plan."""

    def solve(coupling: str) -> Allocation:
        return plan(store, profile.with_coupling(coupling), budget_bytes, request.constraints)

    found, additive = {"plan": solve(request.method.coupling)}, solve("none")
    return found if additive.plan == found["plan"].plan else found | {"additive": additive}
