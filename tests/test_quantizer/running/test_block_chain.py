"""Promises of quantizer.running.block_chain: what cannot be run block by block is refused."""

from typing import Any

import pytest
import torch

from quantizer.errors import ModelError
from quantizer.running.block_chain import check_block_chain
from quantizer.running.runner import BlockRunner
from quantizer.structure.linear_form import to_linear_form
from tests.support.mixtures import MIXTURES, TRANSPOSED, build_mixture


@pytest.mark.parametrize("family", [*MIXTURES, *TRANSPOSED])
def test_ordinary_models_pass(family: str) -> None:
    model = build_mixture(family)
    to_linear_form(model)
    check_block_chain(BlockRunner(model))


def spoiled(forward: Any) -> BlockRunner:
    model = build_mixture("mixtral")
    layers = model.model.layers
    layers[1].forward = forward(model, layers[0], layers[1].forward)
    return BlockRunner(model)


def test_a_block_that_reads_what_another_left_is_refused() -> None:
    seen: list[torch.Tensor] = []

    def forward(_: Any, first: Any, own: Any) -> Any:
        first.register_forward_pre_hook(lambda _, args: seen.append(args[0]))

        def run(*args: Any, **kwargs: Any) -> Any:
            return own(*args, **kwargs) + len(seen)

        return run

    with pytest.raises(ModelError, match="gives another result when it runs again"):
        check_block_chain(spoiled(forward))


def test_a_block_that_needs_the_weights_of_skipped_ones_is_refused() -> None:
    def forward(model: Any, first: Any, own: Any) -> Any:
        state: list[torch.Tensor] = []
        model.register_forward_pre_hook(lambda *_: state.clear())
        first.self_attn.register_forward_hook(lambda *call: state.append(call[2][0]))

        def run(*args: Any, **kwargs: Any) -> Any:
            return own(*args, **kwargs) + state.pop()

        return run

    with pytest.raises(ModelError, match="block 1 of MixtralForCausalLM needs more from"):
        check_block_chain(spoiled(forward))
