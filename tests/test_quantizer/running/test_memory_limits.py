"""Promises of quantizer.running.memory, and of the work that uses it.

What does not fit at once is done in pieces, with the same result.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantizer.conversion.blocks import QuantizationSpec, quantize_blocks
from quantizer.durable import PartStore
from quantizer.errors import MemoryShort
from quantizer.plans.fidelity import Fidelity
from quantizer.running.block_inputs import BlockInputs
from quantizer.running.evaluate import evaluate_models
from quantizer.running.memory import MicroBatches, to_device
from quantizer.running.moments import Calibration, input_moments
from quantizer.running.runner import BlockRunner
from quantizer.structure.blocks import find_layers
from quantizer.training.blockwise import train_blocks
from quantizer.training.spec import TrainingSpec
from tests.support.quantized import TinyModel
from tests.support.trained import WINDOWS, quantized, quiet

FAMILIES = ("llama", "gpt_neox")


class Card:
    """Stands for a graphics card that holds so many windows.

    Blocks of a model that get more raise what torch raises there.
    """

    def __init__(self, windows: int) -> None:
        """Hold so many windows."""
        self.windows, self.refused = windows, 0

    def refuse(self, _: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        """Look at what enters a block."""
        states = args[0] if args else kwargs["hidden_states"]
        if len(states) > self.windows:
            self.refused += 1
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 20.00 GiB.\nMore about it."
            )


@contextmanager
def small_card(model: Any, windows: int) -> Iterator[Card]:
    """Let the last of a model's three blocks hold no more than so many windows."""
    card = Card(windows)
    handle = BlockRunner(model).blocks[2].register_forward_pre_hook(card.refuse, with_kwargs=True)
    try:
        yield card
    finally:
        handle.remove()


def _limited(most: int, tried: list[slice]) -> Any:
    def work(some: slice) -> list[int]:
        tried.append(some)
        if some.stop - some.start > most:
            raise torch.OutOfMemoryError("no memory left")
        return list(range(some.start, some.stop))

    return work


CASES = [(8, 8, [8]), (8, 3, [2, 2, 2, 2]), (7, 4, [4, 3]), (5, 1, [1] * 5), (1, 1, [1])]


@pytest.mark.parametrize(("windows", "most", "sizes"), CASES)
def test_pieces_cover_all_windows_in_order(windows: int, most: int, sizes: list[int]) -> None:
    tried: list[slice] = []
    pieces = MicroBatches().run(_limited(most, tried), windows)
    assert [len(piece) for piece in pieces] == sizes
    assert [window for piece in pieces for window in piece] == list(range(windows))


def test_what_was_done_before_it_failed_is_kept_and_the_limit_remembered() -> None:
    micro_batches, tried = MicroBatches(), []
    micro_batches.run(_limited(4, tried), 8)
    assert tried == [slice(0, 8), slice(0, 4), slice(4, 8)]
    tried.clear()
    micro_batches.run(_limited(2, tried), 8)
    assert tried == [slice(0, 4), slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]
    tried.clear()
    micro_batches.run(_limited(4, tried), 3)
    assert tried == [slice(0, 2), slice(2, 3)]


def test_it_begins_with_as_many_as_it_is_told() -> None:
    tried: list[slice] = []
    MicroBatches(3).run(_limited(2, tried), 4)
    assert tried == [slice(0, 3), slice(0, 2), slice(2, 4)]


def test_work_that_leaves_something_behind_begins_anew() -> None:
    total: list[int] = []

    def add(some: slice) -> int:
        total.extend(range(some.start, some.stop))
        if len(total) > 3 and some.stop - some.start > 1:
            raise torch.OutOfMemoryError("no memory left")
        return 1

    assert MicroBatches().run(add, 4, undo=total.clear) == [1] * 4
    assert total == [0, 1, 2, 3]


def test_where_not_one_window_fits_it_says_what_to_do() -> None:
    with pytest.raises(MemoryShort, match=r"one window \(CUDA out of memory\)\): use fewer tokens"):
        MicroBatches().run(
            lambda _: (_ for _ in ()).throw(
                torch.OutOfMemoryError("CUDA out of memory)\nTraceback")
            ),
            2,
        )


def test_a_model_that_does_not_fit_on_the_device_says_so(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    model = tiny_model("llama")
    monkeypatch.setattr(nn.Linear, "_apply", no_room)
    with pytest.raises(
        MemoryShort,
        match=r"\d+ bytes do not fit on device 'cpu' \(CUDA out of memory.\): use a larger",
    ):
        to_device(model, "cpu")


def test_other_errors_are_not_caught() -> None:
    with pytest.raises(ValueError, match="mine"):
        MicroBatches().run(lambda _: (_ for _ in ()).throw(ValueError("mine")), 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_runner_gives_the_same_states_in_pieces(tiny_model: TinyModel, family: str) -> None:
    model = tiny_model(family)
    runner, layer = BlockRunner(model), find_layers(model)[-1]
    states = runner.initial_states(WINDOWS)
    before = runner.run_blocks(WINDOWS, states, 0, 2)
    moments = input_moments(BlockInputs(runner, 2, [WINDOWS], [before]), layer)
    whole = [
        runner.head_input(WINDOWS, states, 0),
        runner.run_blocks(WINDOWS, before, 2, 3),
        moments,
    ]
    with small_card(model, 3) as card:
        runner = BlockRunner(model)
        moments = input_moments(BlockInputs(runner, 2, [WINDOWS], [before]), layer)
        pieces = [
            runner.head_input(WINDOWS, states, 0),
            runner.run_blocks(WINDOWS, before, 2, 3),
            moments,
        ]
    assert card.refused == 2, "8 windows, 4 windows, and then never again"
    for found, expected in zip(pieces, whole, strict=True):
        torch.testing.assert_close(found, expected)


def test_quantizing_on_a_small_card_gives_what_a_large_one_gives(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    fidelity = (Fidelity(2, 4, 0.4, 32),)
    weights = []
    for windows in (8, 1):
        model = tiny_model("llama")
        layers = find_layers(model)
        with small_card(model, windows) as card:
            spec = QuantizationSpec({layer.name: fidelity for layer in layers})
            parts = PartStore(tmp_path / str(windows))
            quantize_blocks(BlockRunner(model), layers, spec, Calibration(WINDOWS, 8), parts, quiet)
        weights.append(
            {layer.name: model.get_submodule(layer.name).weight.data for layer in layers}
        )
    assert card.refused > 0
    for name, expected in weights[0].items():
        differing = (weights[1][name] - expected).abs() > 1e-6
        assert differing.float().mean() < 0.01, "sums in another order flip a code here and there"


def test_blocks_trained_on_a_small_card_end_as_on_a_large_one(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    _, untrained = quantized(tiny_model("llama"), PartStore(tmp_path / "q"))
    spec = TrainingSpec(10, batch=4, code_rate=0.02, scale_rate=0.01, penalty=0.1)
    losses = []
    for windows in (8, 1):
        model = tiny_model("llama")
        with small_card(model, windows) as card:
            parts = PartStore(tmp_path / str(windows))
            blocks = train_blocks(
                BlockRunner(model),
                untrained,
                WINDOWS,
                spec,
                parts,
                quiet,
            )
        losses.append([block.loss_after for block in blocks])
    assert card.refused > 0
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert all(block.loss_after < block.loss_before for block in blocks)


def test_scores_on_a_small_card_are_those_of_a_large_one(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    whole = evaluate_models(
        {"original": model}, "original", WINDOWS, 8, PartStore(tmp_path / "a"), quiet
    )
    with small_card(model, 2) as card:
        pieces = evaluate_models(
            {"original": model}, "original", WINDOWS, 8, PartStore(tmp_path / "b"), quiet
        )
    assert card.refused == 2
    assert pieces["original"].to_json() == pytest.approx(whole["original"].to_json(), rel=1e-6)
    assert pieces["original"].windows == 8
