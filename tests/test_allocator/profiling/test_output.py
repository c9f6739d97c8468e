"""The `output` signal predicts the KL divergence of changed layers, alone and together."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from allocator.demands.menu import Menu
from allocator.profile import Array, Profile
from allocator.profiling.end_effects import interpolation, menu_effects
from allocator.profiling.output import output_effects
from quantizer.durable import PartStore
from quantizer.plans.fidelity import Fidelity
from tests.support.profiled_models import (
    Loader,
    Measured,
    log_probs,
    make_context,
    make_loader,
    make_menu,
    make_spec,
    run,
    windows,
)

PROBES = windows(12, 64, 1)
"""Enough tokens that the random projection of the sketches does not matter."""

SPEC = make_spec("output", PROBES, batch=4)

ACCURACY = {(2, 4): 0.2, (3, 4): 0.1, (4, 8): 0.06}
"""Largest relative error of predicted KL changes, over all single changes together.

Large changes also have third-order terms.
"""


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Loader:
    return make_loader(tmp_path_factory.mktemp("output"))


def measure(load: Loader, folder: Path, menu: Menu, *, in_original: bool = False) -> Measured:
    """Return the damage as measured on the probes, without the shrinking of noise."""
    candidates = PartStore(folder / "candidates")
    parts = PartStore(folder / "parts")
    spec = replace(SPEC, in_original=in_original)
    profile = run(load(), parts, spec, menu, candidates)
    model = load()
    original = log_probs(model, PROBES)
    context = make_context(model, candidates, parts, spec, menu)
    linear, factor, _ = menu_effects(
        output_effects(context), interpolation(context.output_error, profile.context)
    )
    return Measured(replace(profile, linear=linear, factor=factor), context, original)


@pytest.fixture(scope="module", params=list(ACCURACY), ids=str)
def measured(
    request: pytest.FixtureRequest, load: Loader, tmp_path_factory: pytest.TempPathFactory
) -> Measured:
    return measure(load, tmp_path_factory.mktemp("parts"), make_menu(*request.param))


@pytest.fixture(scope="module")
def whole(load: Loader, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """Return a profile as the signal gives it."""
    return run(load(), PartStore(tmp_path_factory.mktemp("whole")), SPEC)


def accuracy(measured: Measured) -> float:
    menu = measured.context.menu
    return ACCURACY[menu.fidelities[0].bits_lo, menu.fidelities[-1].bits_hi]


def factor_of_ends(profile: Profile) -> Array:
    """Return the columns of the two ends, [rank, 2 L]."""
    return profile.factor.reshape(-1, *profile.linear.shape)[:, :, [0, -1]].reshape(
        len(profile.factor), -1
    )


def test_the_model_is_left_in_the_context_whose_loss_is_stored(measured: Measured) -> None:
    assert measured.divergence({}) == pytest.approx(measured.profile.context_loss, rel=1e-4)


def test_the_context_has_no_effect(measured: Measured) -> None:
    profile = measured.profile
    assert not profile.linear[:, profile.context].any()
    assert not profile.factor.reshape(-1, *profile.linear.shape)[:, :, profile.context].any()


def test_damage_is_the_change_of_the_divergence(measured: Measured) -> None:
    before = measured.divergence({})
    exact = np.array(
        [[measured.divergence({at: end}) - before for end in (0, 1)] for at in range(21)]
    )
    predicted = measured.profile.damage()[:, [0, -1]]
    assert np.linalg.norm(predicted - exact) < accuracy(measured) * np.linalg.norm(exact)


@pytest.mark.parametrize("measured", [(4, 8)], indirect=True)  # larger changes saturate
def test_loss_is_the_divergence_of_a_few_changes_taken_together(measured: Measured) -> None:
    rng = np.random.default_rng(0)
    profile = measured.profile
    before = measured.divergence({})
    exact: list[float] = []
    found: list[float] = []
    for _ in range(12):
        changes = {int(at): int(rng.integers(2)) for at in rng.choice(21, 3, replace=False)}
        choice = np.full(21, measured.context.menu.context)
        choice[list(changes)] = [
            len(profile.fidelities) - 1 if end else 0 for end in changes.values()
        ]
        exact.append(measured.divergence(changes) - before)
        found.append(profile.loss(choice) - profile.context_loss)
    assert np.linalg.norm(np.array(found) - exact) < 0.15 * np.linalg.norm(exact)


def test_the_coupling_of_the_ends_is_that_of_the_exact_outputs(measured: Measured) -> None:
    exact = exact_coupling(measured)
    factor = factor_of_ends(measured.profile)
    found = factor.T @ factor
    # A layer's own products are in the linear term.
    apart = np.kron(np.eye(21), np.ones((2, 2))) == 0
    assert np.linalg.norm((found - exact)[apart]) < 0.5 * np.linalg.norm(exact[apart])


def exact_coupling(measured: Measured) -> Array:
    """Return the mean over tokens of dz_1' F dz_2 for all pairs of single changes, [2 L, 2 L]."""
    context = measured.outputs({})
    p = context.exp()
    # Log probabilities differ from logits by a shift of each token, which does not change F.
    moved = torch.stack(
        [measured.outputs({at: end}) - context for at in range(21) for end in (0, 1)]
    )
    centred = (moved - (p * moved).sum(-1, keepdim=True)) * p.sqrt()
    flat = centred.flatten(1)
    return np.asarray((flat @ flat.t() / len(p)).numpy(), dtype=np.float64)


@pytest.mark.parametrize("measured", [(4, 8)], indirect=True)
def test_shrinking_keeps_the_coupling_and_most_of_the_damage(
    measured: Measured, whole: Profile
) -> None:
    assert np.array_equal(whole.factor, measured.profile.factor)
    assert 0.8 < np.corrcoef(whole.damage().ravel(), measured.profile.damage().ravel())[0, 1] < 1


def test_another_seed_measures_nearly_the_same(
    load: Loader, whole: Profile, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = run(load(), PartStore(tmp_path_factory.mktemp("other")), replace(SPEC, seed=1))
    off = (other.damage() - whole.damage())[:, [0, -1]]
    assert 0 < np.linalg.norm(off) < 0.1 * np.linalg.norm(whole.damage()[:, [0, -1]])


def divergence_in_original(measured: Measured, changes: dict[int, int]) -> float:
    """Return the exact KL of the original with only these layers at an end of the menu."""
    context = measured.context
    context.set_original()
    measured.set_ends(changes)
    found = measured.divergence({})
    context.set_uniform()
    return found


@pytest.fixture(scope="module")
def in_original(load: Loader, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """Return what is measured with the original model as the context."""
    return measure(load, tmp_path_factory.mktemp("original"), make_menu(4, 8), in_original=True)


def test_in_the_original_damage_is_the_divergence_of_one_layer_quantized(
    in_original: Measured,
) -> None:
    assert in_original.profile.context is None
    assert in_original.profile.context_loss == pytest.approx(0, abs=1e-6)
    exact = np.array(
        [[divergence_in_original(in_original, {at: end}) for end in (0, 1)] for at in range(21)]
    )
    predicted = in_original.profile.damage()[:, [0, -1]]
    assert np.linalg.norm(predicted[:, 0] - exact[:, 0]) < 0.06 * np.linalg.norm(exact[:, 0])
    assert (exact[:, 1] < 0.1 * exact[:, 0]).all()  # 8 bits cause hardly any damage
    assert (predicted[:, 1] < 0.1 * predicted[:, 0]).all()


def test_in_the_original_the_model_is_left_in_the_context_all_the_same(
    in_original: Measured,
) -> None:
    context = in_original.context
    for index in range(3):
        for name, weights in context.candidates.block(index).weights.items():
            found = in_original.model.get_submodule(name).weight
            assert torch.equal(found, weights[context.uniform.name].dequantize())


def test_the_coupling_predicts_how_small_changes_interact(load: Loader, tmp_path: Path) -> None:
    """Large changes saturate, which a quadratic loss cannot express."""
    small = measure(
        load,
        tmp_path,
        Menu((Fidelity.uniform(8, 64), Fidelity.uniform(8, 32)), 0),
        in_original=True,
    )
    single = np.array([divergence_in_original(small, {at: 0}) for at in range(21)])
    rng = np.random.default_rng(0)
    exact: list[float] = []
    coupled: list[float] = []
    added: list[float] = []
    for count in (12, 15, 18, 21) * 2:
        rows = rng.choice(21, count, replace=False)
        share = np.zeros(small.profile.linear.shape)
        share[rows, 0] = 1
        exact.append(divergence_in_original(small, dict.fromkeys(rows.tolist(), 0)))
        coupled.append(small.profile.loss_of_shares(share))
        added.append(single[rows].sum())
    off = np.linalg.norm(np.array(coupled) - exact)
    assert off < 0.02 * np.linalg.norm(exact)
    assert off < 0.6 * np.linalg.norm(np.array(added) - exact)
