"""Promises of quantizer.training.distill.

The model comes nearer to the original, resumes exactly, and survives too little memory.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantizer.durable import PartStore
from quantizer.errors import MemoryShort
from quantizer.modules.linear import set_dequantized_weight
from quantizer.packed.weight import QuantizedWeight
from quantizer.running.runner import BlockRunner
from quantizer.training.distill import distill
from quantizer.training.latent import LatentLinear
from quantizer.training.spec import TrainingSpec
from tests.support.quantized import TinyModel, logits_of
from tests.support.trained import WINDOWS, Interrupted, quantized, quiet, same

SPEC = TrainingSpec(6, batch=4, code_rate=0.02, scale_rate=0.01)


def _loss(model: Any, original: Tensor) -> Tensor:
    """KL(original || model) from full logits."""
    log_p = original.log_softmax(-1)
    log_q = model(input_ids=WINDOWS, use_cache=False).logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_distilling_brings_the_model_nearer_to_the_original(
    tiny_model: TinyModel, tmp_path: Path, family: str
) -> None:
    original = logits_of(tiny_model(family), WINDOWS)
    _, untrained = quantized(tiny_model(family), PartStore(tmp_path / "q"))
    losses = {}
    for trained in ("codes", "scales"):
        spec = TrainingSpec(40, batch=4, code_rate=0.005, scale_rate=0.01, trained=trained)
        found = distill(
            BlockRunner(tiny_model(family)),
            untrained,
            WINDOWS,
            spec,
            PartStore(tmp_path / trained),
            quiet,
        )
        losses[trained] = _loss_of(tiny_model(family), found, original)
        assert all(found[name].fidelity == weight.fidelity for name, weight in untrained.items())
    before = _loss_of(tiny_model(family), untrained, original)
    assert losses["codes"] < 0.9 * before
    assert losses["scales"] < 0.9 * before


@torch.no_grad()
def _loss_of(model: Any, untrained: dict[str, QuantizedWeight], original: Tensor) -> float:
    for name, weight in untrained.items():
        set_dequantized_weight(model, name, weight)
    return float(_loss(model, original))


def test_a_step_is_the_plain_gradient_of_the_divergence(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Slow reference: the whole model with latent layers, its full logits, and torch's own Adam."""
    original = logits_of(tiny_model("llama"), WINDOWS)
    _, untrained = quantized(tiny_model("llama"), PartStore(tmp_path / "q"))
    model = tiny_model("llama").requires_grad_(requires_grad=False)
    layers = {
        name: LatentLinear(model.get_submodule(name), weight) for name, weight in untrained.items()
    }
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
    factors = [
        {"params": [p.factor], "share": 0.04 / 2**p.bits}
        for layer in layers.values()
        for p in layer.parts
    ]
    latents = [part.latent for layer in layers.values() for part in layer.parts]
    optimizer = torch.optim.Adam([*factors, {"params": latents, "share": 0.02}], betas=(0.9, 0.95))
    for step, rows in enumerate(SPEC.window_order(len(WINDOWS))):
        for group in optimizer.param_groups:
            group["lr"] = group["share"] * SPEC.rate_share(step)
        log_q = original[rows].log_softmax(-1)
        log_p = model(input_ids=WINDOWS[rows], use_cache=False).logits.log_softmax(-1)
        optimizer.zero_grad()
        (log_q.exp() * (log_q - log_p)).sum(-1).mean().backward()
        optimizer.step()

    found = distill(
        BlockRunner(tiny_model("llama")), untrained, WINDOWS, SPEC, PartStore(tmp_path / "d"), quiet
    )
    for name, layer in layers.items():
        expected, got = layer.quantized().dequantize(), found[name].dequantize()
        assert (got - expected).abs().mean() < 1e-3 * (
            expected - untrained[name].dequantize()
        ).abs().mean().clamp(min=1e-3)


@pytest.mark.parametrize("stop", [1, 4, 6])
def test_interrupted_distillation_continues_exactly(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    _, untrained = quantized(tiny_model("llama"), PartStore(tmp_path / "q"))
    straight = distill(
        BlockRunner(tiny_model("llama")), untrained, WINDOWS, SPEC, PartStore(tmp_path / "a"), quiet
    )

    def interrupt(done: int, _count: int) -> None:
        if done == stop:
            raise Interrupted

    monkeypatch.setattr("quantizer.training.distill.SAVE_SECONDS", 0)
    with pytest.raises(Interrupted):
        distill(
            BlockRunner(tiny_model("llama")),
            untrained,
            WINDOWS,
            SPEC,
            PartStore(tmp_path / "b"),
            interrupt,
        )
    steps: list[int] = []
    again = distill(
        BlockRunner(tiny_model("llama")),
        untrained,
        WINDOWS,
        SPEC,
        PartStore(tmp_path / "b"),
        lambda done, _: steps.append(done),
    )
    assert same(again, straight)
    assert steps == list(range(stop + 1, 7))


def test_a_step_that_does_not_fit_is_taken_in_pieces(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, untrained = quantized(tiny_model("llama"), PartStore(tmp_path / "q"))
    whole = distill(
        BlockRunner(tiny_model("llama")), untrained, WINDOWS, SPEC, PartStore(tmp_path / "a"), quiet
    )
    forward, seen = nn.Embedding.forward, []

    def too_large(self: nn.Embedding, ids: Tensor) -> Tensor:
        """Stands for a card that holds one window of a backward pass."""
        if torch.is_grad_enabled() or len(ids) > 2:
            seen.append(len(ids))
        if len(ids) > 1 and (tmp_path / "c" / "teacher-0000.part").exists():
            raise torch.OutOfMemoryError("no room")
        return forward(self, ids)

    monkeypatch.setattr(nn.Embedding, "forward", too_large)
    pieces = distill(
        BlockRunner(tiny_model("llama")), untrained, WINDOWS, SPEC, PartStore(tmp_path / "c"), quiet
    )
    assert max(seen) == 4
    for name, weight in whole.items():
        change = (pieces[name].dequantize() - weight.dequantize()).abs().mean()
        assert change < 1e-3 * (weight.dequantize() - untrained[name].dequantize()).abs().mean()


def test_where_not_even_one_window_fits_it_says_so(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, untrained = quantized(tiny_model("llama"), PartStore(tmp_path / "q"))

    def no_room(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("quantizer.training.distill.divergence", no_room)
    with pytest.raises(MemoryShort, match="one window"):
        distill(
            BlockRunner(tiny_model("llama")),
            untrained,
            WINDOWS,
            SPEC,
            PartStore(tmp_path / "a"),
            quiet,
        )
