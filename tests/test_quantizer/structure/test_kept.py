"""Promises of quantizer.structure.kept: layers that must stay are found in the code that runs."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from quantizer.structure.blocks import find_blocks
from quantizer.structure.kept import (
    OTHER_PRODUCT,
    READ_ELSEWHERE,
    ROUTER,
    SHARED,
    SMALL,
    kept_layers,
)
from quantizer.structure.linear_form import to_linear_form
from tests.support.mixtures import build_mixture


class Mixer(nn.Module):
    """A module of a model whose code reads some weights by itself."""

    def __init__(self, slices: int = 1) -> None:  # noqa: D107
        super().__init__()
        self.config = SimpleNamespace(slices=slices)
        for name in ("plain", "read", "sliced", "trained", "chosen"):
            self.add_module(name, nn.Linear(32, 32))

    def forward(self, states: Any, kernels: Any = None) -> Any:
        if self.config.slices > 1:
            return states @ self.sliced.weight
        if self.training and kernels is None:
            return states @ self.trained.weight
        if kernels is not None:
            return kernels(states, self.chosen.weight)
        return self.plain(states) @ self.read.weight


def kept(block: nn.Module) -> dict[str, str]:
    blocks = nn.ModuleList([block])
    found = kept_layers(nn.ModuleDict({"blocks": blocks}), "blocks", blocks)
    return {name.removeprefix("blocks.0."): reason for name, reason in found.items()}


def test_a_weight_that_code_reads_stays_unless_the_configuration_rules_it_out() -> None:
    assert kept(Mixer()) == {"read": READ_ELSEWHERE, "chosen": READ_ELSEWHERE}
    assert set(kept(Mixer(slices=2))) == {"read", "chosen", "sliced"}


def test_small_shared_and_choosing_layers_stay() -> None:
    shared = nn.Linear(32, 32)
    experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(16))
    block = nn.ModuleDict(
        {
            "narrow": nn.Linear(32, 7),
            "enough": nn.Linear(32, 8),
            "first": shared,
            "second": shared,
            "mixture": nn.ModuleDict({"router": nn.Linear(32, 16), "experts": experts}),
        }
    )
    assert kept(block) == {
        "narrow": SMALL,
        "first": SHARED,
        "second": SHARED,
        "mixture.router": ROUTER,
    }


def test_an_expert_with_as_many_outputs_as_there_are_experts_is_no_router() -> None:
    experts = nn.ModuleList(nn.Linear(32, 16) for _ in range(16))
    block = nn.ModuleDict({"mixture": nn.ModuleDict({"experts": experts})})
    assert not kept(block)


def test_the_router_of_fused_experts_stays() -> None:
    fused = build_mixture("mixtral").model.layers[0].mlp.experts
    fused.num_experts = 8
    fused.gate_up_proj = nn.Parameter(torch.zeros(8, 192, 64))
    fused.down_proj = nn.Parameter(torch.zeros(8, 64, 96))
    block = nn.ModuleDict({"mixture": nn.ModuleDict({"gate": nn.Linear(64, 8), "experts": fused})})
    to_linear_form(block)
    assert kept(block) == {"mixture.gate": ROUTER}


class GroupedLinear(nn.Linear):
    """Has the weight of a linear layer, and computes something else with it."""

    def forward(self, states: Any) -> Any:
        return states.view(2, -1) @ self.weight.view(32, -1)


class SpelledLinear(nn.Linear):
    """Computes what a linear layer does, by code of its own."""

    def forward(self, states: Any) -> Any:
        return states @ self.weight.T + self.bias


def test_a_layer_that_spells_out_its_product_is_a_linear_layer() -> None:
    assert not [
        why
        for why in kept(nn.ModuleDict({"own": SpelledLinear(32, 32)})).values()
        if why == OTHER_PRODUCT
    ]


def test_a_layer_with_a_product_of_its_own_stays() -> None:
    assert kept(nn.ModuleDict({"grouped": GroupedLinear(32, 32)})) == {"grouped": OTHER_PRODUCT}


def test_a_list_of_one_expert_makes_no_router() -> None:
    experts = nn.ModuleList([nn.Linear(32, 32)])
    assert not kept(nn.ModuleDict({"out": nn.Linear(32, 32), "experts": experts}))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_ordinary_models_keep_nothing(family: str) -> None:
    model = build_mixture(family)
    assert not kept_layers(model, *find_blocks(model))


def test_layers_that_state_space_kernels_read_stay() -> None:
    config = AutoConfig.for_model(
        "mamba", vocab_size=64, hidden_size=64, num_hidden_layers=1, time_step_rank=16
    )
    model: Any = AutoModelForCausalLM.from_config(config)
    path, blocks = find_blocks(model)
    assert kept_layers(model, path, blocks) == {f"{path}.0.mixer.dt_proj": READ_ELSEWHERE}
