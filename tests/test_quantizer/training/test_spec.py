"""Promises of quantizer.training.spec: learning rates, the order of windows, refused values."""

import pytest

from quantizer.errors import TrainingError
from quantizer.training.spec import LAST_RATE, WARMUP_STEPS, TrainingSpec


def test_the_rate_rises_and_then_falls_to_its_last_share() -> None:
    spec = TrainingSpec(200)
    shares = [spec.rate_share(step) for step in range(200)]
    peak = shares.index(max(shares))
    assert shares[0] == pytest.approx(1 / WARMUP_STEPS, rel=0.01)
    assert peak == WARMUP_STEPS - 1
    assert shares[:peak] == sorted(shares[:peak])
    assert shares[peak:] == sorted(shares[peak:], reverse=True)
    assert LAST_RATE < shares[-1] < LAST_RATE + 0.01


def test_every_window_is_seen_once_before_any_is_seen_again() -> None:
    order = TrainingSpec(5, batch=4, seed=1).window_order(10)
    seen = order.flatten().tolist()
    assert order.shape == (5, 4)
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert TrainingSpec(5, batch=4, seed=1).window_order(10).equal(order)
    assert not TrainingSpec(5, batch=4, seed=2).window_order(10).equal(order)
    assert TrainingSpec(4, batch=5).window_order(3).shape == (4, 5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "0 steps"),
        ({"batch": 0}, "0 windows"),
        ({"trained": "zeros"}, "'zeros'"),
        ({"code_rate": 0.0}, "rates 0.0"),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        TrainingSpec(**{"steps": 1, **values})  # type: ignore[arg-type]
