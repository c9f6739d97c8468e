"""Promises of quantizer.running.evaluate.

Perplexity, divergence and their standard errors, and scores that survive an interruption.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantizer.durable import PartStore
from quantizer.running.evaluate import evaluate_models
from quantizer.running.quality import Quality
from tests.support.quantized import TinyModel, token_windows

WINDOWS = token_windows(4, 33)
BATCH = 1


class _Interrupted(Exception):
    """Stands for whatever ends a run."""


def _ignore(_done: int, _count: int) -> None:
    pass


def _disturbed(model: Any, strength: float) -> Any:
    """Return the model with noise on its weights, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * strength)
    return model


@pytest.fixture(scope="module")
def models(tiny_model: TinyModel) -> dict[str, nn.Module]:
    """Return an original and two worse models."""
    return {
        "original": tiny_model("llama"),
        "worse": _disturbed(tiny_model("llama"), 0.01),
        "bad": _disturbed(tiny_model("llama"), 0.1),
    }


@pytest.fixture(scope="module")
def found(
    models: dict[str, nn.Module], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Quality]:
    """Return the quality of each of the models."""
    return evaluate_models(
        models, "original", WINDOWS, BATCH, PartStore(tmp_path_factory.mktemp("parts")), _ignore
    )


@torch.no_grad()
def _losses(model: Any) -> Tensor:
    """Return the loss that transformers computes on each window, float64."""
    losses = [float(model(input_ids=window[None], labels=window[None]).loss) for window in WINDOWS]
    return torch.tensor(losses, dtype=torch.float64)


@torch.no_grad()
def _divergences(original: Any, model: Any) -> Tensor:
    """Return the mean of sum p (log p - log q) over the predictions of each window, float64."""
    means = []
    for window in WINDOWS:
        p, q = (
            each(input_ids=window[None]).logits[0, :-1].double().softmax(-1)
            for each in (original, model)
        )
        means.append(float((p * (p.log() - q.log())).sum(-1).mean()))
    return torch.tensor(means, dtype=torch.float64)


def test_the_original_does_not_diverge_from_itself(found: dict[str, Quality]) -> None:
    assert found["original"].kl_nats_per_token == 0
    assert found["original"].kl_stderr == 0


def test_an_equal_model_does_not_diverge(
    models: dict[str, nn.Module], tiny_model: TinyModel, tmp_path: Path
) -> None:
    pair = {"original": models["original"], "twin": tiny_model("llama")}
    found = evaluate_models(pair, "original", WINDOWS, BATCH, PartStore(tmp_path), _ignore)
    assert found["twin"].kl_nats_per_token == pytest.approx(0, abs=1e-7)
    assert found["twin"].perplexity == found["original"].perplexity


@pytest.mark.parametrize("name", ["original", "worse", "bad"])
def test_perplexity_is_exp_of_the_loss_that_transformers_computes(
    name: str, found: dict[str, Quality], models: dict[str, nn.Module]
) -> None:
    losses = _losses(models[name])
    assert found[name].nll_nats_per_token == pytest.approx(float(losses.mean()), rel=1e-5)
    assert found[name].perplexity == pytest.approx(math.exp(losses.mean()), rel=1e-5)


@pytest.mark.parametrize("name", ["worse", "bad"])
def test_divergence_is_from_the_original_to_the_model(
    name: str, found: dict[str, Quality], models: dict[str, nn.Module]
) -> None:
    forward = _divergences(models["original"], models[name])
    backward = _divergences(models[name], models["original"])
    assert found[name].kl_nats_per_token == pytest.approx(float(forward.mean()), rel=1e-4)
    assert abs(float(forward.mean() / backward.mean()) - 1) > 1e-3
    assert found["worse"].kl_nats_per_token < found["bad"].kl_nats_per_token


def test_standard_errors_are_taken_over_windows(
    found: dict[str, Quality], models: dict[str, nn.Module]
) -> None:
    for values, stderr in (
        (_losses(models["bad"]), found["bad"].nll_stderr),
        (_divergences(models["original"], models["bad"]), found["bad"].kl_stderr),
    ):
        mean = sum(values) / 4
        spread = math.sqrt(sum((value - mean) ** 2 for value in values) / 3)
        assert stderr == pytest.approx(spread / 2, rel=1e-3)
    assert found["bad"].perplexity_stderr == pytest.approx(
        found["bad"].perplexity * found["bad"].nll_stderr
    )


def test_predictions_are_counted(found: dict[str, Quality]) -> None:
    assert {(quality.windows, quality.tokens) for quality in found.values()} == {(4, 4 * 32)}


def test_windows_are_scored_on_their_own(
    models: dict[str, nn.Module], found: dict[str, Quality], tmp_path: Path
) -> None:
    turned = evaluate_models(
        models, "original", WINDOWS.flip(0), BATCH, PartStore(tmp_path), _ignore
    )
    assert turned["bad"].nll_nats_per_token == pytest.approx(
        found["bad"].nll_nats_per_token, rel=1e-12
    )


@pytest.mark.parametrize("batch", [2, 3, 4, 100])
def test_the_batch_size_does_not_matter(
    batch: int, models: dict[str, nn.Module], found: dict[str, Quality], tmp_path: Path
) -> None:
    steps: list[tuple[int, int]] = []
    batched = evaluate_models(
        models, "original", WINDOWS, batch, PartStore(tmp_path), lambda *step: steps.append(step)
    )
    for name, quality in found.items():
        assert list(batched[name].to_json().values()) == pytest.approx(
            list(quality.to_json().values()), rel=1e-4
        )
    count = math.ceil(4 / batch)
    assert steps == [(done, count) for done in range(1, count + 1)]


def test_one_window_gives_no_standard_error(models: dict[str, nn.Module], tmp_path: Path) -> None:
    quality = evaluate_models(models, "original", WINDOWS[:1], BATCH, PartStore(tmp_path), _ignore)[
        "bad"
    ]
    written = json.loads(json.dumps(quality.to_json(), allow_nan=False))
    assert {key for key, value in written.items() if value is None} == {
        "perplexity_stderr",
        "nll_stderr",
        "kl_stderr",
    }
    again = Quality.from_json(written)
    assert math.isnan(again.nll_stderr)
    assert again.perplexity == quality.perplexity


def test_a_quality_survives_json(found: dict[str, Quality]) -> None:
    for quality in found.values():
        assert Quality.from_json(json.loads(json.dumps(quality.to_json()))) == quality


@pytest.mark.parametrize("done", [1, 3, 4])
def test_an_interrupted_run_taken_up_again_gives_the_same_numbers(
    done: int, models: dict[str, nn.Module], found: dict[str, Quality], tmp_path: Path
) -> None:
    def interrupt(finished: int, _: int) -> None:
        if finished == done:
            raise _Interrupted

    with pytest.raises(_Interrupted):
        evaluate_models(models, "original", WINDOWS, BATCH, PartStore(tmp_path), interrupt)
    assert len(list(tmp_path.iterdir())) == done
    steps: list[tuple[int, int]] = []
    calls: list[int] = []
    handle = models["bad"].register_forward_pre_hook(lambda *_: calls.append(1))
    again = evaluate_models(
        models, "original", WINDOWS, BATCH, PartStore(tmp_path), lambda *step: steps.append(step)
    )
    handle.remove()
    assert again == found
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert len(calls) == 4 - done


def test_models_in_short_dtypes_are_compared_in_float32(
    models: dict[str, nn.Module], tiny_model: TinyModel, tmp_path: Path
) -> None:
    pair = {"original": models["original"], "short": tiny_model("llama").to(torch.bfloat16)}
    quality = evaluate_models(pair, "original", WINDOWS, BATCH, PartStore(tmp_path), _ignore)[
        "short"
    ]
    assert 0 < quality.kl_nats_per_token < 0.01
