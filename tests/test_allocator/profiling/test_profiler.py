"""For every signal: what a profile holds, the state of the model afterwards, and resuming."""

import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from allocator.errors import SignalUnknown
from allocator.profile import Profile
from allocator.profiling.candidates import Candidates, quantize_candidates
from allocator.signals import SIGNALS
from quantizer.durable import PartStore, Progress
from quantizer.running.runner import BlockRunner
from quantizer.structure.blocks import find_layers
from tests.support.profiled_models import (
    CALIBRATION,
    MENU,
    PROBES,
    Loader,
    make_loader,
    make_spec,
    no_progress,
    run,
    weights_of,
)

signals = pytest.mark.parametrize("signal", list(SIGNALS))


class Interrupted(Exception):
    """Simulates a killed process."""


def interrupting(step: int) -> Progress:
    def on_progress(done: int, _: int) -> None:
        if done == step:
            raise Interrupted

    return on_progress


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Loader:
    return make_loader(tmp_path_factory.mktemp("profiler"))


@pytest.fixture(scope="module")
def quantized(load: Loader, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Return the folder of the quantized candidates, and the model in its context."""
    folder = tmp_path_factory.mktemp("candidates")
    model = load()
    candidates = Candidates(find_layers(model), MENU, PartStore(folder))
    quantize_candidates(BlockRunner(model), candidates, CALIBRATION, no_progress)
    return folder, model


@pytest.fixture(scope="module")
def whole(
    load: Loader, quantized: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Profile, Any]]:
    """Return a profile by each signal, measured in one go, and the model that it leaves."""
    found = {}
    for signal in SIGNALS:
        model = load()
        parts = PartStore(tmp_path_factory.mktemp("whole"))
        found[signal] = run(model, parts, make_spec(signal), MENU, PartStore(quantized[0])), model
    return found


def assert_same(profile: Profile, other: Profile) -> None:
    assert np.array_equal(profile.linear, other.linear)
    assert np.array_equal(profile.factor, other.factor)
    assert replace(profile, linear=other.linear, factor=other.factor) == other


def test_an_unknown_signal_is_refused_before_any_work(load: Loader, tmp_path: Path) -> None:
    with pytest.raises(SignalUnknown, match=r"'guess' does not exist; use one of integral, output"):
        run(load(), PartStore(tmp_path), make_spec("guess"))
    assert not list(tmp_path.iterdir())


@signals
def test_a_profile_says_what_was_measured(
    signal: str, whole: dict[str, tuple[Profile, Any]]
) -> None:
    profile, model = whole[signal]
    assert profile.signal == signal
    assert profile.layers == find_layers(model)
    assert profile.fidelities == MENU.fidelities
    assert profile.context == (None if signal == "noise" else MENU.context)
    assert bool(len(profile.factor)) == SIGNALS[signal].coupled
    assert profile.tokens == PROBES.numel()
    assert (profile.model_sha256, profile.calibration_sha256) == ("a" * 64, "b" * 64)
    assert_same(Profile.loads(*profile.dumps()), profile)


@signals
def test_the_context_has_no_effect_and_the_low_end_harms(
    signal: str, whole: dict[str, tuple[Profile, Any]]
) -> None:
    profile, _ = whole[signal]
    damage = profile.damage()
    assert damage.shape == (21, len(MENU.fidelities))
    if profile.context is None:
        assert (damage[:, -1] < damage[:, 0]).all()
    else:
        assert not profile.linear[:, profile.context].any()
        assert not profile.factor.reshape(-1, *profile.linear.shape)[:, :, profile.context].any()
    if signal != "gradient":  # four windows are too few for it
        assert damage[:, 0].sum() > damage[:, MENU.context].sum() > damage[:, -1].sum()


@signals
def test_the_model_is_left_in_the_context_exactly(
    signal: str, whole: dict[str, tuple[Profile, Any]], quantized: tuple[Path, Any]
) -> None:
    expected = weights_of(quantized[1])
    found = weights_of(whole[signal][1])
    assert [name for name, weight in found.items() if not torch.equal(weight, expected[name])] == []
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in whole[signal][1].modules()
    )


def test_weights_of_the_context_and_the_ends_are_stored_and_errors_of_all_candidates(
    quantized: tuple[Path, Any],
) -> None:
    folder, model = quantized
    candidates = Candidates(find_layers(model), MENU, PartStore(folder))
    kept = (MENU.fidelities[MENU.context], MENU.fidelities[0], MENU.fidelities[-1])
    assert candidates.kept_fidelities == kept
    block = candidates.block(1)
    for layer in candidates.layers_of(1):
        weights = block.weights[layer.name]
        assert torch.equal(
            model.get_submodule(layer.name).weight, weights[kept[0].name].dequantize()
        )
        assert set(weights) == {fidelity.name for fidelity in kept}
        assert set(block.errors[layer.name]) == {fidelity.name for fidelity in MENU.fidelities}


def test_errors_are_in_the_order_of_the_layers_and_of_the_menu(
    quantized: tuple[Path, Any],
) -> None:
    folder, model = quantized
    candidates = Candidates(find_layers(model), MENU, PartStore(folder))
    output, weight = candidates.errors()
    for at, layer in enumerate(candidates.layers):
        errors = candidates.block(layer.block).errors[layer.name]
        for k, fidelity in enumerate(MENU.fidelities):
            error = errors[fidelity.name]
            assert (output[at, k], weight[at, k]) == (error.output, error.weight)


def test_all_weights_are_stored_on_request_and_candidates_are_the_same(
    load: Loader, quantized: tuple[Path, Any], tmp_path: Path
) -> None:
    model = load()
    every = Candidates(find_layers(model), MENU, PartStore(tmp_path))
    few = replace(every, store=PartStore(quantized[0]))
    quantize_candidates(BlockRunner(model), every, CALIBRATION, no_progress, keep_all=True)
    expected = weights_of(quantized[1])
    assert all(torch.equal(weight, expected[name]) for name, weight in weights_of(model).items())
    everything = {layer.name: MENU.fidelities for layer in every.layers}
    blocks = list(zip(every.blocks(everything), few.blocks(few.kept_choices), strict=True))
    assert len(blocks) == 3
    for all_of_block, few_of_block in blocks:
        assert all_of_block.errors == few_of_block.errors
        for name, weights in few_of_block.weights.items():
            found = all_of_block.weights[name]
            assert set(found) == {fidelity.name for fidelity in MENU.fidelities}
            assert all(
                torch.equal(found[kept].dequantize(), weight.dequantize())
                for kept, weight in weights.items()
            )


def test_candidates_may_be_stored_beside_the_measurements(
    load: Loader, whole: dict[str, tuple[Profile, Any]], tmp_path: Path
) -> None:
    assert_same(run(load(), PartStore(tmp_path), make_spec("hessian")), whole["hessian"][0])


@signals
def test_a_resumed_profile_is_the_same_and_takes_the_less_work_the_later_it_was_interrupted(
    signal: str,
    load: Loader,
    quantized: tuple[Path, Any],
    whole: dict[str, tuple[Profile, Any]],
    tmp_path: Path,
) -> None:
    def profile(parts: PartStore, measure: Progress = no_progress) -> tuple[Profile, int]:
        passes: list[int] = []
        model = load()
        model.register_forward_pre_hook(lambda *_: passes.append(1))
        candidates = PartStore(quantized[0])
        found = run(model, parts, make_spec(signal), MENU, candidates, measure=measure)
        return found, len(passes)

    steps: list[int] = []
    again, all_passes = profile(PartStore(tmp_path / "whole"), lambda done, _: steps.append(done))
    assert_same(again, whole[signal][0])
    work = [all_passes]
    for step in sorted(set(steps)):
        parts = PartStore(tmp_path / str(step))
        with pytest.raises(Interrupted):
            profile(parts, interrupting(step))
        resumed, passes = profile(parts)
        assert_same(resumed, again)
        work.append(passes)
    assert all(after < before for before, after in pairwise(work))


def test_a_profile_resumed_while_layers_were_quantized_is_the_same(
    load: Loader, whole: dict[str, tuple[Profile, Any]], tmp_path: Path
) -> None:
    work = []
    for block in (1, 2, 3):
        parts = PartStore(tmp_path / str(block))
        model = load()
        passes: list[int] = []
        with pytest.raises(Interrupted):
            run(load(), parts, make_spec("integral"), quantize=interrupting(block))
        model.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        assert_same(run(model, parts, make_spec("integral")), whole["integral"][0])
        work.append(len(passes))
    assert all(after < before for before, after in pairwise(work))


def test_a_damaged_part_is_measured_again(
    load: Loader, quantized: tuple[Path, Any], whole: dict[str, tuple[Profile, Any]], tmp_path: Path
) -> None:
    shutil.copytree(quantized[0], tmp_path / "parts")
    run(load(), PartStore(tmp_path / "parts"), make_spec("integral"))
    shares = sorted((tmp_path / "parts").glob("shares-*"))
    content = bytearray(shares[0].read_bytes())
    content[-1] ^= 1
    shares[0].write_bytes(content)
    assert_same(
        run(load(), PartStore(tmp_path / "parts"), make_spec("integral")), whole["integral"][0]
    )


@signals
def test_progress_rises_to_all_of_the_steps(signal: str, load: Loader, tmp_path: Path) -> None:
    calls: dict[str, list[tuple[int, int]]] = {"quantize": [], "measure": []}
    run(
        load(),
        PartStore(tmp_path),
        make_spec(signal),
        **{step: lambda *at, rows=rows: rows.append(at) for step, rows in calls.items()},
    )
    assert calls["quantize"] == [(1, 3), (2, 3), (3, 3)]
    done, steps = zip(*calls["measure"], strict=True)
    assert list(done) == sorted(done)
    assert set(steps) == {done[-1]}
