"""Promises of quantizer.training.blockwise.

No block ends worse than it began, and finished blocks are not trained again.
"""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantizer.durable import PartStore
from quantizer.importance.fisher import squared_gradients
from quantizer.modules.linear import set_dequantized_weight
from quantizer.plans.fidelity import Fidelity
from quantizer.running.runner import BlockRunner
from quantizer.structure.blocks import find_layers
from quantizer.training.blockwise import train_blocks
from quantizer.training.latent import LatentLinear
from quantizer.training.penalty import Penalty
from quantizer.training.spec import TrainingSpec
from tests.support.quantized import TinyModel
from tests.support.trained import WINDOWS, Interrupted, quantized, quantized_as, quiet, same

SPEC = TrainingSpec(30, batch=4, code_rate=0.02, scale_rate=0.01)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_blocks_come_nearer_to_the_original_and_report_the_loss_they_have(
    tiny_model: TinyModel, tmp_path: Path, family: str
) -> None:
    _, untrained = quantized(tiny_model(family), PartStore(tmp_path / "q"))
    model = tiny_model(family)
    blocks = train_blocks(
        BlockRunner(model), untrained, WINDOWS, SPEC, PartStore(tmp_path / "t"), quiet
    )

    original, check = BlockRunner(tiny_model(family)), BlockRunner(tiny_model(family))
    target = states = original.initial_states(WINDOWS)
    for index, block in enumerate(blocks):
        target = original.run_blocks(WINDOWS, target, index, index + 1)
        losses = []
        for weights in ({name: untrained[name] for name in block.weights}, block.weights):
            for name, weight in weights.items():
                set_dequantized_weight(check.model, name, weight)
            output = check.run_blocks(WINDOWS, states, index, index + 1)
            halves = zip(torch.split(output, 4), torch.split(target, 4), strict=True)
            losses.append(
                sum(float((o - t).square().mean() / t.square().mean()) for o, t in halves) / 2
            )
        assert [block.loss_before, block.loss_after] == pytest.approx(losses, rel=1e-4)
        assert block.loss_after < block.loss_before
        states = output
    for name, weight in {
        name: weight for block in blocks for name, weight in block.weights.items()
    }.items():
        assert model.get_submodule(name).weight.equal(weight.dequantize()), (
            "the model is left with what was trained"
        )


def test_a_block_that_training_makes_worse_stays_as_it_was_and_the_log_says_so(
    tiny_model: TinyModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, untrained = quantized(tiny_model("llama"), PartStore(tmp_path / "q"))
    wild = TrainingSpec(3, batch=4, code_rate=50.0, scale_rate=5.0)
    with caplog.at_level(logging.INFO, "bitwright"):
        blocks = train_blocks(
            BlockRunner(tiny_model("llama")),
            untrained,
            WINDOWS,
            wild,
            PartStore(tmp_path / "t"),
            quiet,
        )
    assert "0 of 3" in caplog.text
    assert same(
        {name: weight for block in blocks for name, weight in block.weights.items()}, untrained
    )
    assert all(block.loss_after == block.loss_before for block in blocks)


def test_finished_blocks_are_not_trained_again(tiny_model: TinyModel, tmp_path: Path) -> None:
    _, untrained = quantized(tiny_model("llama"), PartStore(tmp_path / "q"))
    straight = train_blocks(
        BlockRunner(tiny_model("llama")),
        untrained,
        WINDOWS,
        SPEC,
        PartStore(tmp_path / "a"),
        quiet,
    )

    def interrupt(done: int, _count: int) -> None:
        if done == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        train_blocks(
            BlockRunner(tiny_model("llama")),
            untrained,
            WINDOWS,
            SPEC,
            PartStore(tmp_path / "b"),
            interrupt,
        )
    kept = {path.name: path.stat().st_mtime_ns for path in PartStore(tmp_path / "b").paths()}
    assert len(kept) == 2
    again = train_blocks(
        BlockRunner(tiny_model("llama")),
        untrained,
        WINDOWS,
        SPEC,
        PartStore(tmp_path / "b"),
        quiet,
    )
    for block, expected in zip(again, straight, strict=True):
        assert (block.loss_before, block.loss_after) == (expected.loss_before, expected.loss_after)
        assert same(block.weights, expected.weights)
    assert (
        kept.items()
        <= {
            path.name: path.stat().st_mtime_ns for path in PartStore(tmp_path / "b").paths()
        }.items()
    )


def test_a_block_without_trained_layers_is_passed_through(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    layers, untrained = quantized(tiny_model("llama"), PartStore(tmp_path / "q"))
    some = {layer.name: untrained[layer.name] for layer in layers if layer.block != 1}
    blocks = train_blocks(
        BlockRunner(tiny_model("llama")),
        some,
        WINDOWS,
        SPEC,
        PartStore(tmp_path / "t"),
        quiet,
    )
    assert [bool(block.weights) for block in blocks] == [True, False, True]


def test_learned_ranges_and_adapters_come_nearer_too(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    layers = find_layers(model)
    choices = {layer.name: (Fidelity.parse("int2g32a4"),) for layer in layers}
    untrained = quantized_as(model, choices, PartStore(tmp_path / "q"))
    spec = TrainingSpec(60, batch=4, trained="clipping", scale_rate=0.001)
    blocks = train_blocks(
        BlockRunner(tiny_model("llama")),
        untrained,
        WINDOWS,
        spec,
        PartStore(tmp_path / "t"),
        quiet,
    )
    for block in blocks:
        assert block.loss_after < block.loss_before
        assert all(
            weight.fidelity == untrained[name].fidelity for name, weight in block.weights.items()
        )


def test_the_penalty_is_its_formula_and_keeps_important_weights_near(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    layers, untrained = quantized(tiny_model("llama"), PartStore(tmp_path / "q"))
    model = tiny_model("llama")
    squared = squared_gradients(BlockRunner(model), layers, WINDOWS)
    name = layers[0].name
    latent = LatentLinear(model.get_submodule(name), untrained[name])
    original = model.get_submodule(name).weight.data
    error = untrained[name].dequantize() - original
    expected = (
        0.5 * (squared[name] * error.square()).sum() / (squared[name] * original.square()).sum()
    )
    assert float(
        Penalty(0.5, squared).of({name: latent}, {name: original}).detach()
    ) == pytest.approx(float(expected), rel=1e-5)

    moved = {}
    for weight in (0.0, 0.3):
        found = train_blocks(
            BlockRunner(tiny_model("llama")),
            untrained,
            WINDOWS,
            replace(SPEC, penalty=weight),
            PartStore(tmp_path / str(weight)),
            quiet,
        )
        trained = {layer: weight for block in found for layer, weight in block.weights.items()}
        moved[weight] = sum(
            float(
                (
                    squared[layer]
                    * (weight.dequantize() - model.get_submodule(layer).weight.data).square()
                ).sum()
            )
            for layer, weight in trained.items()
        )
    assert moved[0.3] < moved[0.0]
