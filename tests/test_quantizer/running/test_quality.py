"""Promises of quantizer.running.quality: figures of windows, and JSON that keeps them."""

import json
import math

import pytest

from quantizer.running.quality import Quality


def test_the_means_over_windows_and_their_errors() -> None:
    quality = Quality.of_windows([[2.0, 0.1], [4.0, 0.3]], tokens=20)
    assert quality.nll_nats_per_token == 3
    assert quality.perplexity == pytest.approx(math.exp(3))
    assert quality.nll_stderr == pytest.approx(1)
    assert quality.perplexity_stderr == pytest.approx(math.exp(3))
    assert quality.kl_nats_per_token == pytest.approx(0.2)
    assert (quality.windows, quality.tokens) == (2, 20)


@pytest.mark.parametrize("nll", [709.5, 1e6, math.inf])
def test_a_loss_whose_exponential_overflows_is_an_infinite_perplexity(nll: float) -> None:
    quality = Quality.of_windows([[nll, 1.0], [nll, 1.0]], tokens=20)
    assert quality.perplexity == math.inf
    values = json.loads(json.dumps(quality.to_json(), allow_nan=False))
    assert values["perplexity"] == "infinity"
    assert Quality.from_json(values).perplexity == math.inf


def test_an_unknown_error_is_null() -> None:
    quality = Quality.of_windows([[2.0, 0.1]], tokens=10)
    assert quality.to_json()["kl_stderr"] is None
    assert math.isnan(Quality.from_json(quality.to_json()).kl_stderr)
