"""Promises of quantizer.structure.linear_form: the same function, all matrices linear layers."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantizer.errors import ModelError
from quantizer.structure.blocks import find_blocks, find_layers
from quantizer.structure.linear_form import to_linear_form
from tests.support.mixtures import MIXTURES, TRANSPOSED, build_mixture
from tests.support.quantized import PACKED_TOKENS as TOKENS

families = pytest.mark.parametrize("family", [*MIXTURES, *TRANSPOSED])


def linear(family: str) -> Any:
    model = build_mixture(family)
    to_linear_form(model, check=True)
    return model


@families
def test_the_model_computes_what_it_did(family: str) -> None:
    model = build_mixture(family)
    with torch.no_grad():
        before = model(TOKENS).logits
        to_linear_form(model, check=True)
        after = model(TOKENS).logits
    assert torch.allclose(after, before, atol=1e-5, rtol=1e-5)


@families
def test_nearly_all_weights_of_the_blocks_are_reached(family: str) -> None:
    model = linear(family)
    whole = sum(each.numel() for each in find_blocks(model)[1].parameters())
    assert sum(layer.weights for layer in find_layers(model)) >= 0.95 * whole


@families
def test_weights_are_views_and_take_no_memory(family: str) -> None:
    original = build_mixture(family)
    storages = {each.untyped_storage().data_ptr() for each in original.parameters()}
    to_linear_form(original)
    assert {each.untyped_storage().data_ptr() for each in original.parameters()} <= storages


@families
def test_the_structure_is_the_same_without_weights(family: str) -> None:
    with torch.device("meta"):
        bare = copy.deepcopy(build_mixture(family)).to("meta")
    to_linear_form(bare)
    assert find_layers(bare) == find_layers(linear(family))


def test_each_expert_and_projection_is_a_layer_of_its_own() -> None:
    kinds = [layer.kind for layer in find_layers(linear("mixtral")) if layer.block == 1]
    assert kinds[:4] == [f"self_attn.{name}_proj" for name in "qkvo"]
    assert kinds[4:] == [
        f"mlp.experts.{expert}.{name}_proj"
        for expert in range(4)
        for name in ("gate", "up", "down")
    ]


def test_the_layers_that_choose_experts_stay() -> None:
    assert not [layer.kind for layer in find_layers(linear("jetmoe")) if "router" in layer.kind]


def test_experts_that_no_token_chose_get_no_gradient_and_do_no_harm() -> None:
    model = linear("mixtral")
    experts = model.model.layers[0].mlp.experts
    states = torch.randn(3, 64)
    output = experts(states, torch.tensor([[1], [1], [1]]), torch.ones(3, 1))
    expert = experts.expert(1)
    expected = expert.down_proj(
        nn.functional.silu(expert.gate_proj(states)) * expert.up_proj(states)
    )
    assert torch.allclose(output, expected, atol=1e-6)


def test_an_index_beyond_the_experts_adds_nothing() -> None:
    experts = linear("mixtral").model.layers[0].mlp.experts
    states = torch.randn(2, 64)
    none = experts(states, torch.tensor([[4], [4]]), torch.ones(2, 1))
    assert torch.equal(none, torch.zeros(2, 64))


def test_experts_too_small_to_be_quantized_stay_whole() -> None:
    model = build_mixture("mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.gate_up_proj = nn.Parameter(torch.zeros(4, 14, 64))
    experts.down_proj = nn.Parameter(torch.zeros(4, 64, 7))
    to_linear_form(model)
    assert model.model.layers[0].mlp.experts is experts


class OtherExperts(nn.Module):
    """Looks like experts that are known, and computes something else."""

    def __init__(self) -> None:  # noqa: D107
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(2, 32, 16))
        self.down_proj = nn.Parameter(torch.randn(2, 16, 16))
        self.act_fn = nn.SiLU()

    def forward(self, hidden: Tensor, _chosen: Tensor, _weights: Tensor) -> Tensor:
        return hidden


def test_experts_that_compute_something_else_are_refused() -> None:
    with pytest.raises(ModelError, match="OtherExperts compute something else"):
        to_linear_form(nn.ModuleDict({"experts": OtherExperts()}), check=True)
