"""What clients and scripts rely on.

Exit codes, HTTP statuses and problem types stay as they are.
"""

import importlib

import pytest

from allocator.errors import BudgetInfeasible
from quantizer.known_error import ExitCode, KnownError
from service.errors import exit_code_of
from service.problems import problem_of

REPORTED = {
    "ModelError": (2, 400, "model-error"),
    "TextError": (2, 400, "text-error"),
    "FidelityError": (2, 400, "fidelity-error"),
    "RoundingError": (2, 400, "rounding-error"),
    "TrainingError": (2, 400, "training-error"),
    "KernelError": (2, 400, "kernel-error"),
    "MemoryShort": (3, 400, "memory-short"),
    "PlanError": (2, 400, "plan-error"),
    "CheckpointError": (2, 400, "checkpoint-error"),
    "PartMissing": (3, 500, "part-missing"),
    "ProfileError": (2, 400, "profile-error"),
    "SignalUnknown": (2, 400, "signal-unknown"),
    "BudgetError": (2, 400, "budget-error"),
    "RuleError": (2, 400, "rule-error"),
    "BudgetInfeasible": (3, 422, "budget-infeasible"),
    "BudgetNotNeeded": (3, 400, "budget-not-needed"),
    "FormulationError": (1, 400, "formulation-error"),
    "SolverFailed": (1, 400, "solver-failed"),
    "LimitInfeasible": (3, 422, "limit-infeasible"),
    "LossUnreachable": (3, 422, "loss-unreachable"),
    "RequestError": (2, 400, "request-error"),
    "OutputError": (2, 400, "output-error"),
    "ProfileUnknown": (2, 404, "profile-unknown"),
    "JobUnknown": (2, 404, "job-unknown"),
    "JobEnded": (2, 409, "job-ended"),
    "JobActive": (2, 409, "job-active"),
    "WebhookUnknown": (2, 404, "webhook-unknown"),
    "TargetRefused": (2, 400, "target-refused"),
    "DeliveryFailed": (3, 400, "delivery-failed"),
    "KeyReused": (2, 422, "key-reused"),
    "QuotaExceeded": (2, 429, "quota-exceeded"),
    "ArtifactUnknown": (2, 404, "artifact-unknown"),
    "ArtifactDamaged": (2, 500, "artifact-damaged"),
    "PathRefused": (2, 400, "path-refused"),
    "NoCredentials": (2, 401, "no-credentials"),
    "NotAllowed": (2, 403, "not-allowed"),
    "Unavailable": (3, 503, "unavailable"),
    "StageKilled": (3, 400, "stage-killed"),
    "BodyTooLarge": (2, 413, "body-too-large"),
    "StorageError": (3, 507, "storage-error"),
}
"""Exit code, HTTP status and problem type of each error."""


def errors() -> list[type[KnownError]]:
    """Return the errors of all packages, without their base classes."""
    found = []
    for package in ("quantizer", "allocator", "service"):
        module = importlib.import_module(f"{package}.errors")
        for value in vars(module).values():
            is_own = isinstance(value, type) and value.__module__ == module.__name__
            if is_own and KnownError not in value.__bases__:
                found.append(value)
    return found


def test_exit_codes_statuses_and_problem_types_are_stable() -> None:
    assert {
        each.__name__: (exit_code_of(each("x")), each.http_status, each.problem_type)
        for each in errors()
    } == REPORTED


def test_each_error_has_a_problem_type_of_its_own() -> None:
    assert all("problem_type" in vars(each) for each in errors())
    assert len({each.problem_type for each in errors()}) == len(errors())


@pytest.mark.parametrize("error", errors(), ids=lambda error: error.__name__)
def test_any_known_error_becomes_a_problem_document(error: type[KnownError]) -> None:
    _, status, slug = REPORTED[error.__name__]
    document = problem_of(error("what is wrong"))
    assert document["type"] == f"urn:bitwright:problem:{slug}"
    assert document["title"] == slug.replace("-", " ")
    assert (document["status"], document["detail"]) == (status, "what is wrong")


def test_a_budget_that_cannot_be_met_comes_with_the_nearest_that_can() -> None:
    error = BudgetInfeasible(
        "too small", budget_bytes=1, nearest_bytes=2, largest_bytes=3, binding=("menu",)
    )
    details = {"budget_bytes": 1, "nearest_bytes": 2, "largest_bytes": 3, "binding": ["menu"]}
    assert details.items() <= problem_of(error).items()


def test_any_other_error_is_a_bug_whose_message_is_not_disclosed() -> None:
    error = ValueError("secret")
    document = problem_of(error)
    assert (document["type"], document["status"]) == ("urn:bitwright:problem:bug", 500)
    assert "secret" not in document["detail"]
    assert exit_code_of(error) == ExitCode.BUG
