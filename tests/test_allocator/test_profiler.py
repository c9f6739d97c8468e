"""The profile of a tiny model says how far its outputs really move, and interruptions leave no trace in it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from allocator.menu import Menu, make_menu
from allocator.profile import Array, Profile
from allocator.profiler import ProfileProgress, ProfileSpec, profile_model
from quantizer.convert import Calibration, install, read_block
from quantizer.durable import PartStore, Progress
from quantizer.layers import find_layers
from quantizer.plan import LayerSpec
from quantizer.runner import BlockRunner
from quantizer.source import find_model, load_model
from tests.tiny import VOCABULARY, save_tiny

GENERATOR = torch.Generator().manual_seed(0)
CALIBRATION = Calibration(torch.randint(VOCABULARY, (4, 32), generator=GENERATOR), 2)
SPEC = ProfileSpec(torch.randint(VOCABULARY, (3, 32), generator=GENERATOR), 64, 0)
AS_MEASURED = replace(SPEC, shrink=False)
"""Damage as the probes show it; shrinking gives up some of that for layers that other probes would show otherwise."""

WIDTHS = (4, 8)

ACCURACY = {(2, 4): 0.2, (3, 4): 0.1, (4, 8): 0.06}
"""How far predicted KL changes may be off, all single changes taken together; large changes have terms of third order."""

Loader = Callable[[], Any]


@dataclass(frozen=True)
class Measured:
    """A profile, the model that was left in its context, and the original's log probabilities on the probes, [N, vocabulary]."""

    profile: Profile
    model: Any
    layers: tuple[LayerSpec, ...]
    menu: Menu
    parts: PartStore
    original: Tensor

    def set_ends(self, changes: dict[int, int]) -> None:
        """Give each layer named by its place the low end, 0, or the high end, 1, of the menu; 2 is back to the context."""
        forms = (self.menu.fidelities[0], self.menu.fidelities[-1], self.menu.fidelities[self.menu.context])
        for at, end in changes.items():
            layer = self.layers[at]
            stored = read_block(self.parts, [layer], {layer.name: forms}, layer.block)
            assert stored is not None
            install(self.model, layer.name, stored.weights[layer.name][forms[end].name])

    def outputs(self, changes: dict[int, int]) -> Tensor:
        """Return the log probabilities of the model with these changes, float64 [N, vocabulary]."""
        self.set_ends(changes)
        found = log_probs(self.model)
        self.set_ends(dict.fromkeys(changes, 2))
        return found

    def divergence(self, changes: dict[int, int]) -> float:
        """Return the exact KL from the original on the probes, [nats/token]."""
        return float((self.original.exp() * (self.original - self.outputs(changes))).sum(-1).mean())


def log_probs(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(SPEC.probes).logits
    return logits.double().log_softmax(-1).flatten(0, 1)


def no_progress(done: int, steps: int) -> None:
    assert 0 < done <= steps


def run(
    model: Any,
    parts: PartStore,
    widths: tuple[int, int],
    quantize: Progress = no_progress,
    measure: Progress = no_progress,
    spec: ProfileSpec = SPEC,
) -> Profile:
    runner, menu = BlockRunner(model), make_menu(*widths, 32, 0.25)
    progress = ProfileProgress(quantize, measure)
    return profile_model(
        runner, find_layers(model), menu, CALIBRATION, spec, parts, progress, model_sha256="a" * 64, calibration_sha256="b" * 64
    )


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Loader:
    path = save_tiny(tmp_path_factory.mktemp("profiler") / "llama", "llama")
    folder = find_model(str(path), path)
    return lambda: load_model(folder, torch.float32, "cpu")


@pytest.fixture(scope="module", params=list(ACCURACY), ids=str)
def measured(request: pytest.FixtureRequest, load: Loader, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    model, parts = load(), PartStore(tmp_path_factory.mktemp("parts"))
    original = log_probs(model)
    profile = run(model, parts, request.param, spec=AS_MEASURED)
    return Measured(profile, model, find_layers(model), make_menu(*request.param, 32, 0.25), parts, original)


@pytest.fixture(scope="module")
def whole(load: Loader, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """Return a profile measured without an interruption."""
    return run(load(), PartStore(tmp_path_factory.mktemp("whole")), WIDTHS)


def accuracy(measured: Measured) -> float:
    return ACCURACY[measured.menu.fidelities[0].bits_lo, measured.menu.fidelities[-1].bits_hi]


def test_the_model_is_left_in_the_context_whose_loss_is_told(measured: Measured) -> None:
    assert measured.divergence({}) == pytest.approx(measured.profile.context_loss, rel=1e-4)


def test_a_profile_says_what_was_measured(measured: Measured) -> None:
    profile = measured.profile
    assert profile.layers == measured.layers
    assert (profile.fidelities, profile.context) == (measured.menu.fidelities, measured.menu.context)
    assert profile.tokens == 96
    assert (profile.model_sha256, profile.calibration_sha256) == ("a" * 64, "b" * 64)
    assert Profile.loads(*profile.dumps()).loss([0] * 21) == profile.loss([0] * 21)


def test_the_context_has_no_effect(measured: Measured) -> None:
    profile = measured.profile
    assert not profile.linear[:, profile.context].any()
    assert not profile.factor.reshape(-1, *profile.linear.shape)[:, :, profile.context].any()


def test_damage_is_the_change_of_the_divergence(measured: Measured) -> None:
    before = measured.divergence({})
    exact = np.array([[measured.divergence({at: end}) - before for end in (0, 1)] for at in range(21)])
    predicted = measured.profile.damage()[:, [0, -1]]
    assert np.linalg.norm(predicted - exact) < accuracy(measured) * np.linalg.norm(exact)


@pytest.mark.parametrize("measured", [(4, 8)], indirect=True)  # larger changes saturate
def test_loss_is_the_divergence_of_changes_taken_together(measured: Measured) -> None:
    rng, profile, before = np.random.default_rng(0), measured.profile, measured.divergence({})
    exact, coupled, added = [], [], []
    for _ in range(12):
        changes = {int(at): int(rng.integers(2)) for at in rng.choice(21, 3, replace=False)}
        choice = np.full(21, measured.menu.context)
        choice[list(changes)] = [len(measured.menu.fidelities) - 1 if end else 0 for end in changes.values()]
        exact.append(measured.divergence(changes) - before)
        coupled.append(profile.loss(choice) - profile.context_loss)
        added.append(profile.damage()[np.arange(21), choice].sum())
    off = np.linalg.norm(np.array(coupled) - exact)
    assert off < 0.15 * np.linalg.norm(exact)
    assert off < 0.8 * np.linalg.norm(np.array(added) - exact)  # effects do not just add up


def test_the_coupling_of_the_ends_is_that_of_the_exact_outputs(measured: Measured) -> None:
    exact = exact_coupling(measured)
    factor = measured.profile.factor.reshape(-1, *measured.profile.linear.shape)[:, :, [0, -1]].reshape(-1, 42)
    found = factor.T @ factor
    assert np.linalg.norm(found - exact) < 0.1 * np.linalg.norm(exact)
    apart = ~np.eye(42, dtype=bool)
    assert np.linalg.norm((found - exact)[apart]) < 0.5 * np.linalg.norm(exact[apart])


def exact_coupling(measured: Measured) -> Array:
    """Return the mean over tokens of dz_1' F dz_2 for all pairs of single changes, [2 L, 2 L]."""
    context = measured.outputs({})
    p = context.exp()
    # log probabilities differ from logits by a shift for each token, which F does not see
    moved = torch.stack([measured.outputs({at: end}) - context for at in range(21) for end in (0, 1)])
    centred = (moved - (p * moved).sum(-1, keepdim=True)) * p.sqrt()
    flat = centred.flatten(1)
    return np.asarray((flat @ flat.t() / len(p)).numpy(), dtype=np.float64)


class Interrupted(Exception):
    """Stands for a killed process."""


def interrupting(block: int) -> Progress:
    def tell(done: int, _: int) -> None:
        if done == block:
            raise Interrupted

    return tell


def test_a_resumed_profile_is_the_same_and_takes_the_less_work_the_later_it_was_interrupted(
    load: Loader, whole: Profile, tmp_path: Path
) -> None:
    work = []
    for step, block in (("quantize", 1), ("quantize", 3), ("measure", 1), ("measure", 2)):
        parts, passes, model = PartStore(tmp_path / f"{step}{block}"), [], load()
        with pytest.raises(Interrupted):
            run(load(), parts, WIDTHS, **{step: interrupting(block)})
        model.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        resumed = run(model, parts, WIDTHS)
        assert np.array_equal(resumed.linear, whole.linear)
        assert np.array_equal(resumed.factor, whole.factor)
        assert replace(resumed, linear=whole.linear, factor=whole.factor) == whole
        work.append(len(passes))
    assert all(after < before for before, after in pairwise(work))


def test_both_steps_tell_of_every_block(load: Loader, tmp_path: Path) -> None:
    told: dict[str, list[tuple[int, int]]] = {"quantize": [], "measure": []}
    run(load(), PartStore(tmp_path), WIDTHS, *(lambda *state, to=rows: to.append(state) for rows in told.values()))
    assert told == {"quantize": [(1, 3), (2, 3), (3, 3)], "measure": [(1, 3), (2, 3), (3, 3)]}


@pytest.mark.parametrize("measured", [(4, 8)], indirect=True)
def test_shrinking_keeps_the_coupling_and_most_of_the_damage(measured: Measured, load: Loader, tmp_path: Path) -> None:
    shrunk = run(load(), PartStore(tmp_path), (4, 8))
    assert np.array_equal(shrunk.factor, measured.profile.factor)
    assert 0.8 < np.corrcoef(shrunk.damage().ravel(), measured.profile.damage().ravel())[0, 1] < 1


def test_another_seed_measures_nearly_the_same(load: Loader, whole: Profile, tmp_path: Path) -> None:
    other = run(load(), PartStore(tmp_path), WIDTHS, spec=replace(SPEC, seed=1))
    off = (other.damage() - whole.damage())[:, [0, -1]]
    assert 0 < np.linalg.norm(off) < 0.1 * np.linalg.norm(whole.damage()[:, [0, -1]])
