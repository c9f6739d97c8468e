"""Promises of quantizer.conversion.blocks.

Blocks are quantized once, on the inputs that quantized blocks give, and interrupted work continues.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantizer.conversion import blocks
from quantizer.conversion.blocks import QuantizationSpec, quantize_blocks
from quantizer.conversion.quantized_block import (
    QuantizedBlock,
    read_block,
    read_blocks,
)
from quantizer.durable import PartStore
from quantizer.modules.linear import set_dequantized_weight
from quantizer.packed.weight import QuantizedWeight
from quantizer.plans.fidelity import Fidelity
from quantizer.rounding.columns import column_impact
from quantizer.rounding.gptq import gptq_layer
from quantizer.running.block_inputs import BlockInputs
from quantizer.running.moments import Calibration, input_groups
from quantizer.running.runner import BlockRunner
from quantizer.structure.blocks import find_layers
from tests.support.moments import moments_by_hook
from tests.support.quantized import (
    TinyModel,
    token_windows,
)

CALIBRATION = Calibration(token_windows(5, 40), 2)
CHOICES = (Fidelity(2, 4, 0.4, 32), Fidelity.uniform(3, 32))
MEASURED = (Fidelity.uniform(2, 32), CHOICES[1], Fidelity(3, 8, 0.4, 64))
"""Fidelities of which one is also a choice.

They have other low widths and group sizes, and so other high-impact columns.
"""


class _Interrupted(Exception):
    """Stands for whatever ends a run."""


def _quantize(
    model: nn.Module,
    folder: Path,
    on_progress: Callable[[int, int], None] = lambda _done, _count: None,
    measured: Sequence[Fidelity] = (),
) -> None:
    layers = find_layers(model)
    spec = QuantizationSpec({layer.name: CHOICES for layer in layers}, measured=measured)
    quantize_blocks(BlockRunner(model), layers, spec, CALIBRATION, PartStore(folder), on_progress)


def _blocks(model: nn.Module, folder: Path) -> list[QuantizedBlock]:
    layers = find_layers(model)
    return list(read_blocks(PartStore(folder), layers, {layer.name: CHOICES for layer in layers}))


def _files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        layer.name: model.get_submodule(layer.name).weight.detach().clone()
        for layer in find_layers(model)
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: TinyModel) -> tuple[Path, Any]:
    """Return the parts and the model that an undisturbed run leaves."""
    folder, model = tmp_path_factory.mktemp("finished"), tiny_model("llama")
    _quantize(model, folder)
    return folder, model


def test_the_same_work_gives_the_same_bytes(
    finished: tuple[Path, Any], tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    _quantize(model, tmp_path)
    assert _files(tmp_path) == _files(finished[0])
    assert len(_files(tmp_path)) == 3
    expected = _weights(finished[1])
    assert all(torch.equal(weight, expected[name]) for name, weight in _weights(model).items())


@pytest.mark.parametrize("done", [1, 2, 3])
def test_an_interrupted_run_continues_to_the_same_bytes(
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
def test_a_damaged_block_is_quantized_again_and_logged(
    position: int,
    finished: tuple[Path, Any],
    tiny_model: TinyModel,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
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
    stored = {
        name: candidates
        for block in _blocks(model, folder)
        for name, candidates in block.weights.items()
    }
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
        # the finished model gives a layer the inputs that it was quantized on
        moments = moments_by_hook(model, layer, CALIBRATION).float()
        for choice in CHOICES:
            stored = blocks[layer.block].weights[layer.name][choice.name].dequantize()
            impact = column_impact(
                originals[layer.name], moments, choice.bits_lo, choice.group_size
            )
            expected = gptq_layer(originals[layer.name], moments, choice, impact).dequantize()
            equal_rows = int(((stored - expected).abs().amax(1) < 1e-5).sum())
            assert equal_rows >= 0.9 * layer.out_features


@pytest.mark.parametrize("measured", [(), MEASURED], ids=["choices alone", "some only measured"])
def test_every_candidate_has_its_errors_and_only_choices_are_stored(
    measured: tuple[Fidelity, ...], tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    originals = _weights(model)
    _quantize(model, tmp_path, measured=measured)
    for block in _blocks(model, tmp_path):
        for name, errors in block.errors.items():
            assert set(errors) == {fidelity.name for fidelity in (*CHOICES, *measured)}
            assert set(block.weights[name]) == {choice.name for choice in CHOICES}
            for choice in CHOICES:
                off = block.weights[name][choice.name].dequantize() - originals[name]
                assert errors[choice.name].weight == pytest.approx(
                    float(off.norm() / originals[name].norm()) ** 2, rel=1e-4
                )


def test_measured_fidelities_leave_only_their_errors(
    finished: tuple[Path, Any], tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    _quantize(model, tmp_path, measured=MEASURED)
    expected = _weights(finished[1])
    assert all(torch.equal(weight, expected[name]) for name, weight in _weights(model).items())
    for block, alone in zip(_blocks(model, tmp_path), _blocks(model, finished[0]), strict=True):
        for name, candidates in alone.weights.items():
            assert all(
                _same_weight(block.weights[name][fidelity], weight)
                for fidelity, weight in candidates.items()
            )
            assert alone.errors[name].items() <= block.errors[name].items()
    size = sum(len(content) for content in _files(tmp_path).values()) - sum(
        len(content) for content in _files(finished[0]).values()
    )
    numbers = 2 * 8 * len(find_layers(model)) * (len(MEASURED) - 1)  # one of them was kept already
    assert (
        numbers < size < 12 * numbers
    )  # the rest is names; a single candidate of a single layer takes more than all numbers


def test_a_candidate_quantized_beside_others_equals_one_quantized_alone(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    first = [
        layer
        for layer in find_layers(model)
        if layer.kind == "self_attn.q_proj" and layer.block == 0
    ]
    several = tuple(dict.fromkeys((*CHOICES, *MEASURED)))

    def quantize(*fidelities: Fidelity) -> QuantizedBlock:
        parts = PartStore(tmp_path / "-".join(fidelity.name for fidelity in fidelities))
        choices = {first[0].name: fidelities}
        runner = BlockRunner(tiny_model("llama"))
        spec = QuantizationSpec(choices)
        quantize_blocks(runner, first, spec, CALIBRATION, parts, lambda *_: None)
        return read_block(parts, first, choices, 0)

    beside = quantize(*several)
    for fidelity in several:
        alone = quantize(fidelity)
        assert _same_weight(
            beside.weights[first[0].name][fidelity.name],
            alone.weights[first[0].name][fidelity.name],
        ), fidelity.name
        assert (
            beside.errors[first[0].name][fidelity.name]
            == alone.errors[first[0].name][fidelity.name]
        )


def _same_weight(weight: QuantizedWeight, other: QuantizedWeight) -> bool:
    return weight.fidelity == other.fidelity and all(
        torch.equal(weight.tensors[name], other.tensors[name]) for name in other.tensors
    )


def test_errors_are_those_on_the_inputs_that_quantized_layers_give(
    finished: tuple[Path, Any], tiny_model: TinyModel
) -> None:
    folder, model = finished
    originals, blocks = _weights(tiny_model("llama")), _blocks(model, folder)
    for layer in find_layers(model):
        off = (_weights(model)[layer.name] - originals[layer.name]).double()
        exact = float((off @ moments_by_hook(model, layer, CALIBRATION)).mul(off).sum())
        assert blocks[layer.block].errors[layer.name][CHOICES[0].name].output == pytest.approx(
            exact, rel=1e-3
        )


def test_install_keeps_the_dtype_of_the_model(
    finished: tuple[Path, Any], tiny_model: TinyModel
) -> None:
    folder, model = finished
    name = "model.layers.0.mlp.up_proj"
    stored = _blocks(model, folder)[0].weights[name][CHOICES[1].name]
    other = tiny_model("llama").to(torch.bfloat16)
    set_dequantized_weight(other, name, stored)
    assert torch.equal(other.get_submodule(name).weight, stored.dequantize(torch.bfloat16))


def test_layers_that_are_never_called_come_last_and_are_plainly_rounded(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    torch.manual_seed(0)
    for block in model.model.layers:
        block.idle = nn.Linear(64, 16, bias=False)
    originals = _weights(model)
    runner, batch = BlockRunner(model), CALIBRATION.batches()[0]
    members = [layer for layer in find_layers(model) if layer.block == 0]
    groups = input_groups(BlockInputs(runner, 0, [batch], [runner.initial_states(batch)]), members)
    assert [layer.kind for layer in groups[-1]] == ["idle"]
    _quantize(model, tmp_path)
    name = "model.layers.2.idle"
    expected = gptq_layer(originals[name], torch.eye(64), CHOICES[1], torch.ones(64)).dequantize()
    block = _blocks(model, tmp_path)[2]
    assert torch.equal(block.weights[name][CHOICES[1].name].dequantize(), expected)
    assert block.errors[name][CHOICES[1].name].output == 0
    assert block.errors[name][CHOICES[1].name].weight > 0


@pytest.mark.parametrize(
    ("free_bytes", "pieces"), [(2**36, [7]), (2**33, [3, 3, 1]), (2**20, [1] * 7)]
)
def test_a_gpu_quantizes_as_many_fidelities_at_once_as_its_free_memory_takes(
    free_bytes: int, pieces: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free_bytes, free_bytes))
    widest = 14336 * 4096
    found = blocks._pieces(
        [Fidelity(2, 3, tenths / 10, 64) for tenths in range(1, 8)], widest, torch.device("cuda")
    )
    assert [len(piece) for piece in found] == pieces
    for piece in found:
        assert len(piece) == 1 or len(piece) * blocks._BYTES_PER_WEIGHT * widest <= free_bytes / 4
