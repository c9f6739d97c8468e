"""The stage that solves for plans, and finds the uniform plans that they are compared with."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from allocator import allocate as solver
from allocator.answers.allocation import Allocation
from allocator.answers.uniform import likely_uniform_plans
from allocator.demands.constraints import Constraints
from allocator.profile import Profile
from quantizer.durable import PartStore
from quantizer.plans.fidelity import SCALE_BITS, Fidelity
from quantizer.plans.plan import LayerSpec, Plan
from service.request.request import RunRequest
from service.stages.context import RunContext
from service.stages.machine import versions_of
from service.stages.prepared_run import PreparedRun
from service.storage.stage_store import StageKey

PLAN = "plan"
"""Name of the solver's plan."""
ADDITIVE = "additive"
"""Name of the solver's plan without coupling."""
UNIFORM = "uniform"
"""How names of uniform plans begin."""
_SOLVING = ("numpy", "scipy", "osqp")
"""Packages whose versions decide which plan is found."""


@dataclass(frozen=True, slots=True)
class CandidatePlans:
    """The plans that are quantized and compared before one of them is delivered.

    Attributes:
        allocations: the solver's plans by name, `plan` first.
        uniforms: the uniform plans by name, the most promising one first. A uniform plan stores all
            layers alike.
        embeddings: fidelities of embedding and head, the same under all plans.
    """

    allocations: Mapping[str, Allocation]
    uniforms: Mapping[str, Plan]
    embeddings: Mapping[LayerSpec, Fidelity]

    @property
    def by_name(self) -> dict[str, Plan]:
        """All plans by name, the solver's first, with embedding and head after the layers."""
        solved = {name: allocation.plan for name, allocation in self.allocations.items()}
        plans = solved | dict(self.uniforms)
        return {name: plan.with_embeddings(self.embeddings) for name, plan in plans.items()}

    def allocation(self, name: str, profile: Profile) -> Allocation:
        """Return a candidate as an answer to the run's budget, with the loss that is predicted."""
        if name in self.allocations:
            return self.allocations[name]
        return self.allocations[PLAN].replaced_by(self.uniforms[name], profile)


def solve_plans(
    context: RunContext, request: RunRequest, profile: Profile, prepared: PreparedRun
) -> CandidatePlans:
    """Return the candidate plans of a run.

    They are the plan with the coupling that the request names, the additive plan where it differs,
    and as many uniform plans as the effort allows.
    """
    constraints, budget_bytes = request.constraints, prepared.budget_bytes
    coupled = profile.with_coupling(request.method.coupling)
    plan = solve_plan(context, coupled, budget_bytes, constraints)
    additive = solve_plan(context, profile.with_coupling("none"), budget_bytes, constraints)
    allocations = {PLAN: plan}
    if additive.plan != plan.plan:
        allocations[ADDITIVE] = additive
    rivals = likely_uniform_plans(profile, budget_bytes)[: request.effort.rivals]
    uniforms = {uniform_name(rival): rival for rival in rivals}
    return CandidatePlans(allocations, uniforms, prepared.embedding_fidelities)


def solve_plan(
    context: RunContext, profile: Profile, budget_bytes: int, constraints: Constraints
) -> Allocation:
    """Solve for the plan of a budget.

    It is always solved anew, which takes less time than the lookup. It is stored as a record of the
    run.
    """
    allocation = solver.allocate(profile, budget_bytes, constraints)
    inputs = {
        "profile": profile.digest,
        "budget_bytes": budget_bytes,
        "constraints": asdict(constraints),
        "method": solver.METHOD,
        "versions": versions_of(_SOLVING),
    }

    def make(folder: Path, _: PartStore) -> None:
        (folder / "plan.json").write_text(allocation.dumps(), encoding="utf-8")

    context.store.get(StageKey("plan", inputs), make)
    return allocation


def uniform_name(plan: Plan) -> str:
    """Return a name for a uniform plan.

    It states the code widths, the group size and, where they are not the default ones, the bits of
    the scales.
    """
    widest = max(plan.fidelities, key=lambda fidelity: (fidelity.bits_hi, fidelity.ratio))
    scales = f"s{widest.scale_bits}" if widest.scale_bits < SCALE_BITS[0] else ""
    lowest = min(fidelity.bits_lo for fidelity in plan.fidelities)
    return f"{UNIFORM} {lowest}+{widest.bits_hi} g{widest.group_size}{scales}"
