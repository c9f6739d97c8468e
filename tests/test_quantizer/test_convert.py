"""Promises of quantizer.convert: blocks are quantized on what quantized blocks give them, once, and can be taken up again."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantizer.convert import Calibration, QuantizedBlock, input_groups, input_moments, install, quantize_blocks, read_block
from quantizer.durable import PartStore
from quantizer.fidelity import Fidelity
from quantizer.gptq import quantize_layer
from quantizer.layers import find_layers
from quantizer.plan import LayerSpec
from quantizer.runner import BlockRunner
from quantizer.selection import column_impact
from tests.test_quantizer.helpers import TinyModel, token_windows

CALIBRATION = Calibration(token_windows(5, 40), 2)
CHOICES = (Fidelity(2, 4, 0.4, 32), Fidelity.uniform(3, 32))


class _Interrupted(Exception):
    """Stands for whatever ends a run."""


def _quantize(model: nn.Module, folder: Path, on_progress: Callable[[int, int], None] = lambda _done, _count: None) -> None:
    layers = find_layers(model)
    choices = {layer.name: CHOICES for layer in layers}
    quantize_blocks(BlockRunner(model), layers, choices, CALIBRATION, PartStore(folder), on_progress)


def _blocks(model: nn.Module, folder: Path) -> list[QuantizedBlock]:
    found = []
    for index in range(3):
        members = [layer for layer in find_layers(model) if layer.block == index]
        block = read_block(PartStore(folder), members, {layer.name: CHOICES for layer in members}, index)
        assert block is not None
        found.append(block)
    return found


def _files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {layer.name: model.get_submodule(layer.name).weight.detach().clone() for layer in find_layers(model)}


def _moments_by_hook(model: Any, layer: LayerSpec) -> Tensor:
    """Return X'X/n from the inputs that a hook sees while the whole model runs."""
    seen: list[Tensor] = []
    handle = model.get_submodule(layer.name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in CALIBRATION.batches():
            model(input_ids=batch, use_cache=False)
    handle.remove()
    inputs = torch.cat([states.reshape(-1, layer.in_features) for states in seen]).double()
    return inputs.t() @ inputs / len(inputs)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: TinyModel) -> tuple[Path, Any]:
    """Return the parts and the model that an undisturbed run leaves."""
    folder, model = tmp_path_factory.mktemp("finished"), tiny_model("llama")
    _quantize(model, folder)
    return folder, model


def test_the_same_work_gives_the_same_bytes(finished: tuple[Path, Any], tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    _quantize(model, tmp_path)
    assert _files(tmp_path) == _files(finished[0])
    assert len(_files(tmp_path)) == 3
    expected = _weights(finished[1])
    assert all(torch.equal(weight, expected[name]) for name, weight in _weights(model).items())


@pytest.mark.parametrize("done", [1, 2, 3])
def test_an_interrupted_run_taken_up_again_gives_the_same_bytes(
    done: int, finished: tuple[Path, Any], tiny_model: TinyModel, tmp_path: Path
) -> None:
    def interrupt(finished_blocks: int, _: int) -> None:
        if finished_blocks == done:
            raise _Interrupted

    with pytest.raises(_Interrupted):
        _quantize(tiny_model("llama"), tmp_path, interrupt)
    kept = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert len(kept) == done
    model, steps = tiny_model("llama"), []
    _quantize(model, tmp_path, lambda *step: steps.append(step))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert _files(tmp_path) == _files(finished[0])
    assert all((tmp_path / name).stat().st_mtime_ns == time for name, time in kept.items())
    expected = _weights(finished[1])
    assert all(torch.equal(weight, expected[name]) for name, weight in _weights(model).items())


@pytest.mark.parametrize("position", [0, 40, -1])
def test_a_damaged_part_is_made_again_and_logged(
    position: int, finished: tuple[Path, Any], tiny_model: TinyModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, content in _files(finished[0]).items():
        (tmp_path / name).write_bytes(content)
    damaged = tmp_path / "block-0001.part"
    content = bytearray(damaged.read_bytes())
    content[position] ^= 1
    damaged.write_bytes(content)
    with caplog.at_level(logging.WARNING, "bitwright"):
        _quantize(tiny_model("llama"), tmp_path)
    assert [record.args for record in caplog.records] == [(damaged,)]
    assert "damaged" in caplog.text
    assert _files(tmp_path) == _files(finished[0])


def test_the_model_is_left_running_with_the_first_choice(finished: tuple[Path, Any]) -> None:
    folder, model = finished
    stored = {name: forms for block in _blocks(model, folder) for name, forms in block.weights.items()}
    assert set(stored) == {layer.name for layer in find_layers(model)}
    for name, weight in _weights(model).items():
        assert set(stored[name]) == {choice.name for choice in CHOICES}
        assert torch.equal(weight, stored[name][CHOICES[0].name].dequantize())


def test_each_layer_is_quantized_on_what_the_quantized_layers_before_it_give(
    finished: tuple[Path, Any], tiny_model: TinyModel
) -> None:
    folder, model = finished
    originals = _weights(tiny_model("llama"))
    blocks = _blocks(model, folder)
    for layer in find_layers(model):
        moments = _moments_by_hook(model, layer).float()  # the finished model gives a layer the same inputs as it had then
        impact = column_impact(originals[layer.name], moments, 2, 32)
        assert torch.allclose(blocks[layer.block].impact[layer.name], impact, rtol=1e-3)
        for choice in CHOICES:
            stored = blocks[layer.block].weights[layer.name][choice.name].dequantize()
            expected = quantize_layer(originals[layer.name], moments, choice, impact).dequantize()
            equal_rows = int(((stored - expected).abs().amax(1) < 1e-5).sum())
            assert equal_rows >= 0.9 * layer.out_features


def test_read_block_returns_nothing_before_the_block_is_done(tmp_path: Path, tiny_model: TinyModel) -> None:
    layers = [layer for layer in find_layers(tiny_model("llama")) if layer.block == 0]
    assert read_block(PartStore(tmp_path), layers, {layer.name: CHOICES for layer in layers}, 0) is None


def test_install_keeps_the_dtype_of_the_model(finished: tuple[Path, Any], tiny_model: TinyModel) -> None:
    folder, model = finished
    name = "model.layers.0.mlp.up_proj"
    stored = _blocks(model, folder)[0].weights[name][CHOICES[1].name]
    other = tiny_model("llama").to(torch.bfloat16)
    install(other, name, stored)
    assert torch.equal(other.get_submodule(name).weight, stored.dequantize(torch.bfloat16))


@pytest.mark.parametrize(
    ("family", "groups"),
    [
        ("llama", [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]),
        ("gemma3", [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]),
        ("opt", [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]]),
        ("gpt_neox", [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]]),
    ],
)
def test_layers_that_share_their_input_are_grouped_in_call_order(
    family: str, groups: list[list[str]], tiny_model: TinyModel
) -> None:
    runner = BlockRunner(tiny_model(family))
    members = [layer for layer in find_layers(runner.model) if layer.block == 1]
    batch = CALIBRATION.batches()[0]
    hidden = runner.blocks_between(batch, runner.enter(batch), 0, 1)
    found = input_groups(runner, members, batch, hidden, 1)
    assert [sorted(layer.kind.rpartition(".")[2] for layer in group) for group in found] == [sorted(group) for group in groups]


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"])
def test_input_moments_are_the_mean_of_the_outer_products(family: str, tiny_model: TinyModel) -> None:
    runner = BlockRunner(tiny_model(family))
    batches = CALIBRATION.batches()
    hidden = [runner.blocks_between(batch, runner.enter(batch), 0, 1) for batch in batches]
    for layer in (layer for layer in find_layers(runner.model) if layer.block == 1):
        moments = input_moments(runner, layer, batches, hidden, 1)
        expected = _moments_by_hook(runner.model, layer)
        assert torch.allclose(moments.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        assert not runner.model.get_submodule(layer.name)._forward_pre_hooks


def test_layers_that_are_never_called_come_last_and_are_plainly_rounded(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    torch.manual_seed(0)
    for block in model.model.layers:
        block.idle = nn.Linear(64, 16, bias=False)
    originals = _weights(model)
    runner, batch = BlockRunner(model), CALIBRATION.batches()[0]
    members = [layer for layer in find_layers(model) if layer.block == 0]
    groups = input_groups(runner, members, batch, runner.enter(batch), 0)
    assert [layer.kind for layer in groups[-1]] == ["idle"]
    _quantize(model, tmp_path)
    name = "model.layers.2.idle"
    expected = quantize_layer(originals[name], torch.eye(64), CHOICES[1], torch.ones(64)).dequantize()
    assert torch.equal(_blocks(model, tmp_path)[2].weights[name][CHOICES[1].name].dequantize(), expected)


def test_batches_cover_the_windows_in_order() -> None:
    assert [len(batch) for batch in CALIBRATION.batches()] == [2, 2, 1]
    assert torch.equal(torch.cat(CALIBRATION.batches()), CALIBRATION.windows)
