"""The `gradient` signal: products of each window's gradient with changes to the menu's ends."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from allocator.profile import Array
from allocator.profiling.context import ProfilingContext
from allocator.profiling.gradient import measure_gradient, window_effects
from allocator.profiling.loss_model import LossModel
from quantizer.durable import PartStore
from tests.support.profiled_models import (
    MENU,
    divergences,
    log_probs,
    make_context,
    make_loader,
    make_spec,
    weight_gradients,
    windows,
)

PROBES = windows(5, 32, 1)


@pytest.fixture(scope="module", params=["llama", "opt"])
def context(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> ProfilingContext:
    folder = tmp_path_factory.mktemp("gradient")
    model = make_loader(folder, request.param)()
    return make_context(
        model,
        PartStore(folder / "candidates"),
        PartStore(folder / "parts"),
        make_spec("gradient", PROBES, batch=2),
    )


@pytest.fixture(scope="module")
def found(context: ProfilingContext) -> LossModel:
    return measure_gradient(context)


@pytest.fixture(scope="module")
def exact(context: ProfilingContext) -> Array:
    """Return the signal's products by explicit gradients, [2 L, windows].

    They are <gradient of the window's mean negative log-likelihood, end - context>.
    """
    model = context.runner.model

    def losses() -> torch.Tensor:
        log_p = model(input_ids=PROBES, use_cache=False).logits[:, :-1].log_softmax(-1)
        return -log_p.gather(-1, PROBES[:, 1:, None]).mean((1, 2))

    gradients = weight_gradients(model, losses)
    rows: list[list[float]] = []
    for layer in context.layers:
        weights = context.candidates.block(layer.block).weights[layer.name]
        here = weights[MENU.fidelities[MENU.context].name].dequantize()
        for end in (MENU.fidelities[0], MENU.fidelities[-1]):
            change = weights[end.name].dequantize() - here
            rows.append([float((row[layer.name] * change).sum()) for row in gradients])
    return np.array(rows)


def test_samples_are_the_products_of_explicit_gradients(
    context: ProfilingContext, exact: Array
) -> None:
    samples = window_effects(context).first
    assert samples.shape == exact.shape
    assert np.linalg.norm(samples - exact) < 1e-3 * np.linalg.norm(exact)


def test_damage_is_the_mean_product_and_half_the_fisher_term(
    found: LossModel, exact: Array, context: ProfilingContext
) -> None:
    own = np.square(found.factor).sum(axis=0).reshape(found.linear.shape)
    damage = (found.linear + own / 2)[:, [0, -1]].ravel()
    expected = exact.mean(axis=1) + 32 * np.square(exact).mean(axis=1) / 2
    assert np.linalg.norm(damage - expected) < 1e-3 * np.linalg.norm(expected)
    assert found.linear.shape == (len(context.layers), len(MENU.fidelities))


def test_the_coupling_is_the_gram_matrix_of_the_samples(found: LossModel, exact: Array) -> None:
    columns = found.factor.reshape(len(found.factor), *found.linear.shape)
    ends = columns[:, :, [0, -1]].reshape(len(found.factor), -1)
    expected = 32 * exact @ exact.T / exact.shape[1]
    # A layer's own products are in the linear term.
    apart = np.kron(np.eye(len(found.linear)), np.ones((2, 2))) == 0
    off = np.linalg.norm((ends.T @ ends - expected)[apart]) / np.linalg.norm(expected[apart])
    assert off < 0.02
    assert found.truncation == pytest.approx(off, abs=2e-3)


def test_the_loss_of_a_plan_of_ends_is_that_of_the_sum_of_its_products(
    found: LossModel, exact: Array
) -> None:
    rng, layers = np.random.default_rng(0), len(found.linear)
    for _ in range(10):
        ends = rng.integers(-1, 2, layers)  # low, not at all, high
        share = np.zeros(found.linear.shape)
        share[ends < 0, 0] = share[ends > 0, -1] = 1
        effect = found.factor @ share.ravel()
        total = share[:, [0, -1]].ravel() @ exact
        second = 32 * np.square(total).mean() / 2
        assert (found.linear * share).sum() + effect @ effect / 2 == pytest.approx(
            total.mean() + second, rel=0.02, abs=1e-5
        )


def test_the_context_has_no_effect_and_its_own_loss(
    found: LossModel, context: ProfilingContext
) -> None:
    assert not found.linear[:, MENU.context].any()
    assert not found.factor.reshape(len(found.factor), *found.linear.shape)[
        :, :, MENU.context
    ].any()
    model = context.runner.model
    context.set_original()
    original = log_probs(model, PROBES)
    context.set_uniform()
    assert found.context_loss == pytest.approx(
        float(divergences(original, model, PROBES).mean()), rel=1e-4
    )
    assert found.tokens == PROBES.numel()


def test_probes_that_do_not_fit_together_are_measured_in_pieces(tmp_path: Path) -> None:
    load = make_loader(tmp_path)
    candidates = PartStore(tmp_path / "candidates")
    spec = make_spec("gradient", PROBES, batch=4)
    whole = window_effects(make_context(load(), candidates, PartStore(tmp_path / "a"), spec)).first
    context = make_context(load(), candidates, PartStore(tmp_path / "b"), spec)
    refused: list[int] = []

    def refuse(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Simulate a GPU with memory for the backward pass of one window."""
        states = args[0] if args else kwargs["hidden_states"]
        if torch.is_grad_enabled() and len(states) > 1:
            refused.append(len(states))
            raise torch.OutOfMemoryError("no room")

    context.runner.blocks[1].register_forward_pre_hook(refuse, with_kwargs=True)
    assert np.linalg.norm(window_effects(context).first - whole) < 1e-3 * np.linalg.norm(whole)
    assert refused == [4, 2], "halved twice, and then never again"
