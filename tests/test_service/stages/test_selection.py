"""The candidate plan that is nearest to the original is delivered, and its lead is stated."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantizer.running.quality import Quality
from service.stages.delivery import Delivery
from service.stages.selection import Selection, is_nearer
from service.stages.training import TrainingResult
from tests.support.synthetic_profiles import PROPERTY

DIVERGENCES = st.floats(0, 10)


def quality(kl: float) -> Quality:
    return Quality(20 * math.exp(kl), 1.0, 3.0 + kl, 0.05, kl, 0.01, 8, 8 * 511)


def select(**divergences: float) -> Selection:
    """Return the selection from candidates of these KL divergences, in this order."""
    return Selection.of(
        {"original": quality(0.0)} | {name: quality(kl) for name, kl in divergences.items()}
    )


@PROPERTY
@given(plan=DIVERGENCES, additive=DIVERGENCES, uniform=DIVERGENCES)
def test_no_candidate_is_nearer_to_the_original_than_the_delivered_one(
    plan: float, additive: float, uniform: float
) -> None:
    found = select(plan=plan, additive=additive, uniform=uniform)
    divergences = {"plan": plan, "additive": additive, "uniform": uniform}
    assert divergences[found.delivered] == min(divergences.values())


@pytest.mark.parametrize("best", ["plan", "additive", "uniform"])
def test_any_candidate_may_win(best: str) -> None:
    assert (
        select(**({"plan": 0.5, "additive": 0.5, "uniform": 0.5} | {best: 0.4})).delivered == best
    )


def test_the_divergence_decides_and_not_the_perplexity() -> None:
    fluent = Quality(10.0, 1.0, 2.3, 0.05, 0.6, 0.01, 8, 8 * 511)
    assert (
        Selection.of({"original": quality(0.0), "plan": fluent, "uniform": quality(0.5)}).delivered
        == "uniform"
    )


@pytest.mark.parametrize(
    "names", [("plan", "additive", "uniform"), ("uniform", "plan", "additive")]
)
def test_the_first_of_equals_is_delivered(names: tuple[str, ...]) -> None:
    assert select(**dict.fromkeys(names, 0.25)).delivered == names[0]
    assert select(**({names[0]: 0.5} | dict.fromkeys(names[1:], 0.25))).delivered == names[1]


def test_a_forbidden_candidate_is_compared_but_not_delivered() -> None:
    qualities = {
        "original": quality(0.0),
        "plan": quality(0.5),
        "additive": quality(0.4),
        "uniform": quality(0.1),
    }
    found = Selection.of(qualities, {"uniform"})
    assert (found.delivered, found.uniform) == ("additive", "uniform")
    assert found.lead == pytest.approx(1 - 0.4 / 0.1)


def test_the_original_is_never_delivered() -> None:
    assert select(uniform=3.0).delivered == "uniform"


@pytest.mark.parametrize("names", [("plan", "uniform"), ("uniform", "plan")])
def test_a_candidate_without_a_finite_divergence_is_not_delivered_when_another_has_one(
    names: tuple[str, str],
) -> None:
    broken, sound = names
    assert select(**{broken: math.nan, sound: 0.5}).delivered == sound
    assert select(**{broken: math.inf, sound: 0.5}).delivered == sound


@pytest.mark.parametrize(
    ("plan", "uniform", "lead"),
    [(0.15, 0.2, 0.25), (0.0, 0.2, 1.0), (0.2, 0.2, 0.0), (0.3, 0.2, 0.0), (0.0, 0.0, 0.0)],
)
def test_the_lead_is_the_share_of_the_uniform_plans_divergence_that_is_saved(
    plan: float, uniform: float, lead: float
) -> None:
    assert select(plan=plan, uniform=uniform).lead == pytest.approx(lead, abs=1e-12)


@pytest.mark.parametrize("best", ["uniform 2+3 g128", "uniform 2+4 g256"])
def test_the_lead_is_over_the_best_of_several_uniform_plans(best: str) -> None:
    divergences = {"plan": 0.3, "uniform 2+3 g128": 0.5, "uniform 2+4 g256": 0.5} | {best: 0.4}
    found = select(**divergences)
    assert (found.delivered, found.uniform) == ("plan", best)
    assert found.lead == pytest.approx(0.25)


@PROPERTY
@given(plan=DIVERGENCES, additive=DIVERGENCES, uniform=DIVERGENCES)
def test_the_lead_is_never_negative_and_at_most_all(
    plan: float, additive: float, uniform: float
) -> None:
    assert 0 <= select(plan=plan, additive=additive, uniform=uniform).lead <= 1


def test_the_original_is_no_candidate() -> None:
    found = select(plan=0.15, additive=0.3, uniform=0.2)
    assert found.candidates == {
        "plan": quality(0.15),
        "additive": quality(0.3),
        "uniform": quality(0.2),
    }
    assert (found.delivered_quality, found.uniform_quality) == (quality(0.15), quality(0.2))


@pytest.mark.parametrize(
    ("tuned", "kept"),
    [(0.14, True), (0.15, False), (0.2, False), (math.nan, False), (math.inf, False)],
)
def test_a_trained_plan_is_delivered_only_where_it_is_nearer_to_the_original(
    tuned: float, kept: bool
) -> None:
    selection = select(plan=0.15, uniform=0.2)
    checkpoints = {"plan": Path("plan"), "uniform": Path("uniform")}
    result = TrainingResult(
        Path("plan"), Path("trained"), selection.delivered_quality, quality(tuned)
    )
    delivery = Delivery(Path("model"), selection, checkpoints, result)
    assert is_nearer(quality(tuned), selection.delivered_quality) == kept
    assert delivery.is_trained == kept
    assert delivery.checkpoint == (Path("trained") if kept else Path("plan"))
    evaluated = {"plan": delivery.checkpoint, "uniform": Path("uniform")}
    assert delivery.evaluated == evaluated | ({"untuned": Path("plan")} if kept else {})
    untrained = Delivery(Path("model"), selection, checkpoints, None)
    assert not untrained.is_trained
    assert untrained.checkpoint == Path("plan")
