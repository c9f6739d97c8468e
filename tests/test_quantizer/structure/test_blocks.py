"""Promises of quantizer.structure.blocks: blocks and layers are found in every architecture."""

import pytest
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config

from quantizer.errors import ModelError
from quantizer.running.runner import BlockRunner
from quantizer.structure.blocks import find_blocks, find_layers
from tests.support.quantized import TinyModel
from tests.support.tiny_models import CONFIGS

families = pytest.mark.parametrize("family", list(CONFIGS))


@families
def test_every_linear_in_the_blocks_is_found_and_no_other(
    family: str, tiny_model: TinyModel
) -> None:
    model = tiny_model(family)
    path, blocks = find_blocks(model)
    layers = find_layers(model)
    assert [layer.block for layer in layers] == sorted(layer.block for layer in layers)
    assert len(blocks) == model.config.num_hidden_layers == layers[-1].block + 1
    linears = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    heads = {name for name, module in linears.items() if module is model.get_output_embeddings()}
    assert len(heads) == 1
    assert [layer.name for layer in layers] == [name for name in linears if name not in heads]
    for layer in layers:
        assert layer.name == f"{path}.{layer.block}.{layer.kind}"
        assert (layer.out_features, layer.in_features) == tuple(linears[layer.name].weight.shape)
        assert layer.weights == linears[layer.name].weight.numel()


@families
def test_blocks_have_the_same_kinds(family: str, tiny_model: TinyModel) -> None:
    layers = find_layers(tiny_model(family))
    kinds = [[layer.kind for layer in layers if layer.block == block] for block in range(3)]
    assert kinds[0] == kinds[1] == kinds[2]
    assert len(set(kinds[0])) == len(kinds[0])


def test_lists_of_experts_inside_the_blocks_are_not_taken_for_the_blocks() -> None:
    expert = nn.ModuleList(nn.Linear(32, 32) for _ in range(8))
    block = nn.ModuleDict({"experts": expert, "gate": nn.Linear(32, 8)})
    model = nn.ModuleDict(
        {"few": nn.ModuleList([nn.Linear(4, 4)]), "blocks": nn.ModuleList([block])}
    )
    assert find_blocks(model)[0] == "blocks"
    assert [layer.kind for layer in find_layers(model)] == [
        *(f"experts.{index}" for index in range(8)),
        "gate",
    ]


@pytest.mark.parametrize("find", [find_blocks, find_layers, BlockRunner])
def test_a_model_without_blocks_is_refused(find: object) -> None:
    assert callable(find)
    with pytest.raises(ModelError, match=r"Sequential.*not supported"):
        find(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))


def test_a_model_whose_blocks_hold_no_linear_layers_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=32, n_embd=8, n_layer=2, n_head=2, n_positions=16)
    )
    with pytest.raises(ModelError, match="GPT2LMHeadModel"):
        find_layers(model)
