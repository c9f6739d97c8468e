"""The `integral` signal divides the context's KL divergence among the layers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from allocator.profile import Array, Profile
from allocator.profiling.context import ProfilingContext
from allocator.profiling.integral import STABLE_CORRELATION, damages, layer_shares, measure_integral
from allocator.signals import INTEGRAL_NODES
from quantizer.conversion.blocks import QuantizationSpec, quantize_blocks
from quantizer.durable import PartStore
from quantizer.running.runner import BlockRunner
from quantizer.structure.blocks import find_layers
from tests.support.profiled_models import (
    CALIBRATION,
    MENU,
    PROBES,
    Loader,
    divergences,
    log_probs,
    make_context,
    make_loader,
    make_menu,
    make_spec,
    no_progress,
    run,
    weight_gradients,
    weights_of,
    windows,
)

MakeContext = Callable[..., ProfilingContext]
BATCH = 2


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Loader:
    return make_loader(tmp_path_factory.mktemp("integral"))


@pytest.fixture(scope="module")
def candidates(tmp_path_factory: pytest.TempPathFactory) -> PartStore:
    """Return where the quantized candidates of `MENU` are; they do not depend on the probes."""
    return PartStore(tmp_path_factory.mktemp("candidates"))


@pytest.fixture
def fresh(load: Loader, candidates: PartStore, tmp_path: Path) -> MakeContext:
    """Return what makes a context on probes, with nothing measured yet."""

    def make(probes: torch.Tensor = PROBES, batch: int = BATCH) -> ProfilingContext:
        parts = PartStore(tmp_path / str(len(list(tmp_path.iterdir()))))
        return make_context(load(), candidates, parts, make_spec("integral", probes, batch=batch))

    return make


@pytest.fixture(scope="module")
def original(load: Loader) -> torch.Tensor:
    """Return the original's log probabilities on the probes."""
    return log_probs(load())


@pytest.fixture(scope="module")
def profile(
    load: Loader, candidates: PartStore, tmp_path_factory: pytest.TempPathFactory
) -> Profile:
    return run(
        load(),
        PartStore(tmp_path_factory.mktemp("profile")),
        make_spec("integral"),
        MENU,
        candidates,
    )


def slow_shares(
    context: ProfilingContext, original: torch.Tensor, points: Array, weights: Array
) -> Array:
    """Return the shares by full logits and explicit weight gradients, [windows, L].

    Args:
        context: the model in the context, where it is left.
        original: the original's log probabilities on the probes.
        points: points of the path, 0 to 1.
        weights: their weights in the integral.
    """
    model = context.runner.model
    quantized = weights_of(model)
    total = np.zeros((len(PROBES), len(context.layers)))
    for point, weight in zip(points, weights, strict=True):
        for name, before in context.originals.items():
            model.get_submodule(name).weight.data = before + point * (quantized[name] - before)
        rows = weight_gradients(model, lambda: divergences(original, model))
        errors = {
            name: (quantized[name] - before).double() for name, before in context.originals.items()
        }
        total += weight * np.array(
            [[float((row[name] * errors[name]).sum()) for name in errors] for row in rows]
        )
    for name, weight in quantized.items():
        model.get_submodule(name).weight.data = weight
    return total


def test_shares_are_those_of_explicit_gradients_at_the_nodes(
    fresh: MakeContext, original: torch.Tensor
) -> None:
    context = fresh()
    spread = 0.5 / 3**0.5  # two Gauss-Legendre nodes: 1/2 -+ 1/sqrt(12), of equal weight
    exact = slow_shares(
        context, original, np.array([0.5 - spread, 0.5 + spread]), np.array([0.5, 0.5])
    )
    shares, _ = layer_shares(context, 2)
    assert shares.shape == (len(PROBES), 21)
    assert np.linalg.norm(shares - exact) < 1e-3 * np.linalg.norm(exact)


def test_two_nodes_give_nearly_the_shares_of_many(
    fresh: MakeContext, original: torch.Tensor
) -> None:
    context = fresh()
    points = (np.arange(64) + 0.5) / 64
    exact = slow_shares(context, original, points, np.full(64, 1 / 64)).mean(0)
    shares = layer_shares(context)[0].mean(0)
    assert INTEGRAL_NODES == 2
    assert np.linalg.norm(shares - exact) < 0.02 * np.linalg.norm(exact)


def test_shares_add_up_to_the_divergence_of_the_context_the_closer_the_more_nodes(
    fresh: MakeContext, original: torch.Tensor
) -> None:
    off = []
    for nodes in (1, 2, 8):
        context = fresh()
        shares, losses = layer_shares(context, nodes)
        with torch.no_grad():
            exact = divergences(
                original, context.runner.model
            ).numpy()  # the model is back in the context
        assert losses == pytest.approx(exact, rel=1e-3)
        off.append(float(np.abs(shares.sum(1) - exact).max() / exact.mean()))
    assert off[0] > off[1] > off[2]
    assert off[1] < 0.01
    assert off[2] < 1e-4


def test_damage_grows_with_the_output_error_from_the_context_s(fresh: MakeContext) -> None:
    context, share = fresh(), np.linspace(-0.1, 1, 21)
    found = damages(share, context)
    for layer in range(21):
        here = context.output_error[layer, MENU.context]
        for k in range(len(MENU.fidelities)):
            exact = share[layer] * context.output_error[layer, k] / here - share[layer]
            assert found[layer, k] == pytest.approx(exact, rel=1e-9, abs=1e-15)
    assert not found[:, MENU.context].any()


def test_a_layer_without_an_error_in_the_context_has_no_damage(fresh: MakeContext) -> None:
    context = fresh()
    error = context.output_error.copy()
    error[3] = 0, 0, 0, 0
    error[4] = 1, 0, 0, 0
    found = damages(np.ones(21), replace(context, output_error=error))
    assert not found[3:5].any()
    assert found[5, 0] > 0


def test_the_profile_is_additive_and_of_these_shares(profile: Profile, fresh: MakeContext) -> None:
    context = fresh()
    shares, losses = layer_shares(context)
    assert profile.factor.shape == (0, 21 * len(MENU.fidelities))
    assert profile.truncation == 0
    assert np.array_equal(profile.linear, damages(shares.mean(0), context))
    assert profile.context_loss == losses.mean()
    assert profile.tokens == PROBES.numel()


@pytest.mark.parametrize("widths", [(4, 8), (3, 4), (2, 4), (2, 8)], ids=str)
def test_uniform_plans_are_ranked_as_they_measure_when_installed(
    widths: tuple[int, int], load: Loader, original: torch.Tensor, tmp_path: Path
) -> None:
    menu, exact = make_menu(*widths), []
    profile = run(load(), PartStore(tmp_path / "profile"), make_spec("integral"), menu)
    for fidelity in menu.fidelities:
        model = load()
        layers = find_layers(model)
        choices = dict.fromkeys((layer.name for layer in layers), (fidelity,))
        quantize_blocks(
            BlockRunner(model),
            layers,
            QuantizationSpec(choices),
            CALIBRATION,
            PartStore(tmp_path / fidelity.name),
            no_progress,
        )
        with torch.no_grad():
            exact.append(float(divergences(original, model).mean()))
    predicted = [profile.loss([k] * 21) for k in range(len(menu.fidelities))]
    apart = [
        (worse, better)
        for worse in range(4)
        for better in range(4)
        if exact[better] < 0.95 * exact[worse]
    ]
    assert len(apart) >= 5
    assert all(predicted[better] < predicted[worse] for worse, better in apart)
    assert predicted[menu.context] == pytest.approx(exact[menu.context], rel=1e-3)
    assert np.linalg.norm(np.subtract(predicted, exact)) < 0.4 * np.linalg.norm(
        np.subtract(exact, exact[menu.context])
    )


def test_measuring_stops_once_further_windows_give_the_same_shares(
    load: Loader, candidates: PartStore, tmp_path: Path
) -> None:
    progress: list[tuple[int, int]] = []

    def profile_of(times: int, measure: Any = no_progress) -> Profile:
        spec = make_spec("integral", windows(BATCH, 32, 3).repeat(times, 1))
        return run(
            load(), PartStore(tmp_path / str(times)), spec, MENU, candidates, measure=measure
        )

    short, long = profile_of(4), profile_of(12, lambda *state: progress.append(state))
    assert short.tokens == long.tokens == 4 * BATCH * 32
    assert np.array_equal(long.linear, short.linear)
    assert long.context_loss == short.context_loss
    assert progress[-1][0] == progress[-1][1]
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)


def test_three_batches_are_too_few_to_stop_after(
    load: Loader, candidates: PartStore, tmp_path: Path
) -> None:
    spec = make_spec("integral", windows(BATCH, 32, 3).repeat(3, 1))
    assert run(load(), PartStore(tmp_path), spec, MENU, candidates).tokens == spec.probes.numel()


@pytest.mark.parametrize(
    ("tokens", "least", "most"), [(8, 0.5, 0.9), (48, 0.9, STABLE_CORRELATION)]
)
def test_measuring_goes_on_while_windows_disagree(
    tokens: int, least: float, most: float, fresh: MakeContext
) -> None:
    """Batches alternate between two windows.

    The shorter these are, the less their shares correlate.
    """
    context = fresh(windows(2, tokens, 4).repeat(4, 1), batch=1)
    shares, losses = layer_shares(context)
    assert least < np.corrcoef(shares[:2])[0, 1] < most
    assert len(shares) == len(losses) == 8
    assert np.allclose(shares[::2], shares[0])
    assert np.allclose(shares[1::2], shares[1])
    assert measure_integral(context).tokens == context.spec.probes.numel()


def test_measuring_stops_as_soon_as_windows_agree(fresh: MakeContext) -> None:
    shares, _ = layer_shares(fresh(windows(8, 200, 4), batch=1))
    halves = [shares[start:4:2].mean(0) for start in (0, 1)]
    assert np.corrcoef(halves)[0, 1] >= STABLE_CORRELATION
    assert len(shares) == 4


def test_probes_that_do_not_fit_together_are_measured_in_pieces(fresh: MakeContext) -> None:
    whole, _ = layer_shares(fresh(), INTEGRAL_NODES)
    context, refused = fresh(), []

    def refuse(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Simulate a GPU with memory for the backward pass of one window."""
        states = args[0] if args else kwargs["hidden_states"]
        if torch.is_grad_enabled() and len(states) > 1:
            refused.append(len(states))
            raise torch.OutOfMemoryError("no room")

    context.runner.blocks[1].register_forward_pre_hook(refuse, with_kwargs=True)
    pieces, _ = layer_shares(context, INTEGRAL_NODES)
    assert refused == [2], "once, and then never again"
    np.testing.assert_allclose(pieces, whole, rtol=1e-3, atol=1e-7)
