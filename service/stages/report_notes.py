"""Notes of a report: what a user should know of a run, in sentences."""

from collections.abc import Iterator

from service.stages.checkpoint import read_starved
from service.stages.plan import PLAN
from service.stages.results import RunResults


def notes_of(results: RunResults) -> Iterator[str]:
    """Yield the notes of a run, those of the solver first."""
    yield from results.allocation.notes
    yield from _coverage_notes(results)
    for table, fidelity in results.prepared.embedding_fidelities.items():
        yield (
            f"{table.kind} ({table.name}) is stored at {fidelity.name}, with the plan and the "
            "uniform plan alike"
        )
    yield from _selection_notes(results)
    yield from _training_notes(results)
    yield from _evaluation_notes(results)


def _coverage_notes(results: RunResults) -> Iterator[str]:
    warning = results.prepared.coverage.warning
    if warning is not None:
        yield warning
    starved = read_starved(results.delivery.checkpoints[results.delivery.selection.delivered])
    if starved:
        worst = min(starved, key=lambda name: starved[name])
        yield (
            f"{len(starved)} layers of experts saw fewer calibration tokens than they have columns "
            f"and borrowed from the other experts, {worst} with {starved[worst]} tokens first; "
            "more calibration text helps them"
        )


def _selection_notes(results: RunResults) -> Iterator[str]:
    selection = results.delivery.selection
    loss = {name: quality.kl_nats_per_token for name, quality in selection.quality.items()}
    delivered, uniform = selection.delivered, selection.uniform
    if delivered != PLAN:
        yield (
            f"{delivered!r} is delivered instead of the solver's plan: KL {loss[delivered]:.4f} on "
            f"held-out windows, against {loss[PLAN]:.4f} of the solver's plan"
        )
    if loss[uniform] < loss[delivered]:
        yield (
            f"{uniform!r} is nearer to the original (KL {loss[uniform]:.4f} on held-out windows) "
            "but violates the constraints"
        )


def _training_notes(results: RunResults) -> Iterator[str]:
    training = results.delivery.training
    if training is not None and not training.is_nearer:
        loss = training.trained_quality.kl_nats_per_token
        yield (
            f"training did not help (KL {loss:.4f} on held-out windows): the plan is delivered as "
            "it was before"
        )


def _evaluation_notes(results: RunResults) -> Iterator[str]:
    plan = results.quality["plan"].kl_nats_per_token
    uniform = results.quality["uniform"].kl_nats_per_token
    if uniform > 0 and plan > uniform:
        yield (
            "the plan is worse than the uniform plan of the same bytes: KL "
            f"{plan / uniform - 1:.1%} higher on the evaluation text"
        )
