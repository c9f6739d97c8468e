"""Promises of quantizer.running.runner: the parts of a model add up to the model."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from quantizer.errors import ModelError
from quantizer.running.runner import BlockRunner
from quantizer.structure.blocks import find_layers
from tests.support.quantized import TinyModel, normal, token_windows
from tests.support.tiny_models import CONFIGS, VOCABULARY

families = pytest.mark.parametrize("family", list(CONFIGS))

TOKENS = token_windows(2, 48)
"""Longer than gemma3's sliding window."""

TUPLES = [
    BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
    FalconConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=0,
        bos_token_id=0,
    ),
]
"""Architectures whose blocks return tuples."""


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    logits: Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return logits


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(ModelError, match="head"):
        BlockRunner(AutoModel.from_config(CONFIGS["llama"]))


@families
def test_parts_add_up_to_the_model_bit_for_bit(family: str, tiny_model: TinyModel) -> None:
    model = tiny_model(family)
    expected = _logits(model)
    runner = BlockRunner(model)
    for cuts in ([0, 3], [0, 1, 3], [0, 2, 3], [0, 1, 2, 3], [0, 0, 3, 3]):
        hidden = runner.initial_states(TOKENS)
        for first, last in pairwise(cuts):
            hidden = runner.run_blocks(TOKENS, hidden, first, last)
        with torch.no_grad():
            assert torch.equal(
                runner.logits(TOKENS, runner.head_input(TOKENS, hidden, 3)), expected
            )


@families
@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_head_input_runs_the_blocks_that_are_left(
    family: str, first: int, tiny_model: TinyModel
) -> None:
    runner = BlockRunner(tiny_model(family))
    hidden = runner.run_blocks(TOKENS, runner.initial_states(TOKENS), 0, first)
    head_input = runner.head_input(TOKENS, hidden, first)
    with torch.no_grad():
        assert torch.equal(runner.head(head_input), _logits(runner.model))


@families
def test_final_states_are_the_same_with_gradient(family: str, tiny_model: TinyModel) -> None:
    runner = BlockRunner(tiny_model(family))
    states = runner.final_states_with_gradient(TOKENS)
    assert torch.equal(states, runner.final_states(TOKENS))
    assert torch.equal(states, runner.head_input(TOKENS, runner.initial_states(TOKENS), 0))
    assert not runner.final_states(TOKENS).requires_grad


@families
def test_advance_takes_each_batch_through_one_block(family: str, tiny_model: TinyModel) -> None:
    runner = BlockRunner(tiny_model(family))
    batches = torch.split(TOKENS, 1)
    hidden = [runner.initial_states(batch) for batch in batches]
    moved = runner.advance(batches, hidden, 0)
    assert len(moved) == len(batches)
    for batch, before, after in zip(batches, hidden, moved, strict=True):
        assert torch.equal(after, runner.run_blocks(batch, before, 0, 1))


@families
def test_final_states_with_gradient_are_differentiable_in_what_each_layer_gives(
    family: str, tiny_model: TinyModel
) -> None:
    """Gradients at the outputs of layers give the gradients of their weights.

    The slow reference lets the weight of every layer require a gradient.
    """
    model, cotangent = tiny_model(family), normal(2, 48, 64)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    layers = find_layers(model)
    inputs: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}

    def watch(_: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str) -> None:
        inputs[name] = args[0].detach()
        output.register_hook(lambda gradient: gradients.update({name: gradient}))

    handles = [
        model.get_submodule(layer.name).register_forward_hook(partial(watch, name=layer.name))
        for layer in layers
    ]
    (BlockRunner(model).final_states_with_gradient(TOKENS) * cotangent).sum().backward()
    for handle in handles:
        handle.remove()
    assert all(parameter.grad is None for parameter in model.parameters())
    seen: list[Tensor] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    for layer in layers:
        model.get_submodule(layer.name).weight.requires_grad_()
    model(input_ids=TOKENS, use_cache=False)
    (seen[0] * cotangent).sum().backward()
    handle.remove()
    for layer in layers:
        found = gradients[layer.name].reshape(-1, layer.out_features).t() @ inputs[
            layer.name
        ].reshape(-1, layer.in_features)
        exact = model.get_submodule(layer.name).weight.grad
        assert float((found - exact).norm()) < 1e-4 * float(exact.norm()), layer.name


@families
def test_hidden_states_are_those_that_the_model_itself_passes_on(
    family: str, tiny_model: TinyModel
) -> None:
    model = tiny_model(family)
    with torch.no_grad():
        states = model(input_ids=TOKENS, use_cache=False, output_hidden_states=True).hidden_states
    runner = BlockRunner(model)
    hidden = runner.initial_states(TOKENS)
    assert torch.equal(hidden, states[0])
    for index in range(2):  # what leaves the last block is normed before it is reported
        hidden = runner.run_blocks(TOKENS, hidden, index, index + 1)
        assert torch.equal(hidden, states[index + 1])


@families
def test_given_hidden_states_are_used(family: str, tiny_model: TinyModel) -> None:
    runner = BlockRunner(tiny_model(family))
    given = normal(2, 48, 64)
    changed = runner.run_blocks(TOKENS, given, 1, 2)
    assert not torch.equal(changed, runner.run_blocks(TOKENS, 2 * given, 1, 2))
    assert torch.equal(changed, runner.run_blocks(TOKENS.flip(0), given, 1, 2))
    assert runner.run_blocks(TOKENS, given, 1, 1) is given


@families
def test_the_first_call_of_a_runner_may_be_the_head(family: str, tiny_model: TinyModel) -> None:
    model = tiny_model(family)
    runner = BlockRunner(model)
    head_input = BlockRunner(model).final_states(TOKENS)
    with torch.no_grad():
        assert torch.equal(runner.logits(TOKENS, head_input), _logits(model))


@pytest.mark.parametrize("config", TUPLES, ids=lambda config: config.model_type)
def test_the_first_call_of_a_runner_may_be_the_head_where_blocks_return_tuples(
    config: PreTrainedConfig,
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    head_input = BlockRunner(model).final_states(TOKENS)
    with torch.no_grad():
        assert torch.equal(BlockRunner(model).logits(TOKENS, head_input), _logits(model))


@pytest.mark.parametrize("config", TUPLES, ids=lambda config: config.model_type)
def test_parts_add_up_to_the_model_where_blocks_return_tuples(config: PreTrainedConfig) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    runner = BlockRunner(model)
    hidden = runner.initial_states(TOKENS)
    for index in range(2):
        hidden = runner.run_blocks(TOKENS, hidden, index, index + 1)
    with torch.no_grad():
        assert torch.equal(
            runner.logits(TOKENS, runner.head_input(TOKENS, hidden, 2)), _logits(model)
        )


@families
def test_logits_carry_gradients_to_the_head_input(family: str, tiny_model: TinyModel) -> None:
    runner = BlockRunner(tiny_model(family))
    head_input = normal(2, 48, 64).requires_grad_()
    runner.logits(TOKENS, head_input).sum().backward()
    assert head_input.grad is not None
    assert bool(head_input.grad.any())


@families
def test_the_model_is_unchanged_afterwards(family: str, tiny_model: TinyModel) -> None:
    model = tiny_model(family)
    before = _logits(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = [set(vars(module)) for module in model.modules()]
    runner = BlockRunner(model)
    hidden = runner.run_blocks(TOKENS, runner.initial_states(TOKENS), 0, 2)
    runner.logits(TOKENS, runner.head_input(TOKENS, hidden, 2))
    runner.final_states_with_gradient(TOKENS)
    _assert_untouched(model, runner, attributes)
    assert torch.equal(_logits(model), before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_the_model_is_unchanged_after_an_error(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    attributes = [set(vars(module)) for module in model.modules()]
    runner, wrong = BlockRunner(model), torch.zeros(1, 48, 7)
    for call in (
        lambda: runner.run_blocks(TOKENS, wrong, 1, 2),
        lambda: runner.logits(TOKENS, wrong),
    ):
        with pytest.raises(RuntimeError):
            call()
    _assert_untouched(model, runner, attributes)


def test_forward_methods_that_others_have_wrapped_are_used_and_put_back(
    tiny_model: TinyModel,
) -> None:
    model = tiny_model("llama")
    expected, calls = _logits(model), []
    block = model.model.layers[1]
    original = block.forward

    def wrapped(*args: object, **kwargs: object) -> object:
        calls.append(1)
        return original(*args, **kwargs)

    block.forward = wrapped
    runner = BlockRunner(model)
    with torch.no_grad():
        assert torch.equal(runner.logits(TOKENS, runner.final_states(TOKENS)), expected)
    assert calls == [1]
    assert block.forward is wrapped


def _assert_untouched(
    model: PreTrainedModel, runner: BlockRunner, attributes: list[set[str]]
) -> None:
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert not any("forward" in vars(block) for block in runner.blocks)
    assert not runner.head._forward_pre_hooks
