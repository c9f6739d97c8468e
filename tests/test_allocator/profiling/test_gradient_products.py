"""Inner products of gradients and weight changes equal those of autograd's full gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from allocator.profiling.gradient_products import inner_products
from quantizer.running.runner import BlockRunner
from quantizer.structure.blocks import find_layers
from tests.support.profiled_models import make_loader, weight_gradients, windows

WINDOWS = 3
TOKENS = 24
COUNT = 3
IDS = windows(WINDOWS, TOKENS, 5)
TARGET = torch.randn(WINDOWS, TOKENS, 64, generator=torch.Generator().manual_seed(6))


def head_gradient(states: Tensor) -> Tensor:
    """Return the gradient of half the squared distance from `TARGET`: it depends on the states."""
    return states - TARGET


def losses(model: Any) -> Tensor:
    states: Tensor = model.base_model(input_ids=IDS, use_cache=False).last_hidden_state
    return (states - TARGET).square().sum((1, 2)) / 2


def random_changes(model: Any) -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return {
        layer.name: [
            torch.randn(layer.out_features, layer.in_features, generator=generator)
            for _ in range(COUNT)
        ]
        for layer in find_layers(model)
    }


def fast(model: Any) -> Tensor:
    """Return the products of all random changes, [windows, L, count]."""
    changes = random_changes(model)
    return inner_products(
        BlockRunner(model), IDS, head_gradient, find_layers(model), COUNT, changes.__getitem__
    )


def slow(model: Any) -> Tensor:
    gradients = weight_gradients(model, lambda: losses(model))
    changes = random_changes(model)
    return torch.tensor(
        [
            [[float((row[name] * each).sum()) for each in changes[name]] for name in changes]
            for row in gradients
        ]
    )


def assert_near(found: Tensor, exact: Tensor) -> None:
    """Compare layer by layer, as layers differ in size; the second dimension is the layers'."""
    off = (found - exact).transpose(0, 1).flatten(1).norm(dim=1)
    size = exact.transpose(0, 1).flatten(1).norm(dim=1)
    assert bool((size > 0).all())
    assert float((off / size).max()) < 1e-3


@pytest.fixture(params=["llama", "opt", "gemma3", "gpt_neox"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return make_loader(tmp_path, request.param)()


@pytest.fixture
def llama(tmp_path: Path) -> Any:
    return make_loader(tmp_path)()


class Expert(nn.Module):
    """Gives some tokens of all windows, as one tensor, to a block's MLP; the others get zeros."""

    def __init__(self, inner: nn.Module, tokens: int) -> None:
        """Choose `tokens` tokens."""
        super().__init__()
        self.inner = inner
        order = torch.randperm(WINDOWS * TOKENS, generator=torch.Generator().manual_seed(8))
        self.chosen = order[:tokens]

    def forward(self, states: Tensor) -> Tensor:
        flat = states.reshape(-1, states.shape[-1])
        outputs = self.inner(flat[self.chosen])
        return torch.zeros_like(flat).index_copy(0, self.chosen, outputs).view_as(states)


def test_each_window_has_the_products_of_its_own_gradient(model: Any) -> None:
    assert_near(fast(model), slow(model))


def test_summed_over_windows_products_are_those_of_the_summed_losses(model: Any) -> None:
    assert_near(fast(model).sum(0, keepdim=True), slow(model).sum(0, keepdim=True))


@pytest.mark.parametrize("tokens", [17, WINDOWS])
def test_a_layer_that_sees_some_tokens_of_all_windows_has_the_mean_in_each_row(
    llama: Any, tokens: int
) -> None:
    block = llama.model.layers[1]
    block.mlp = Expert(block.mlp, tokens)
    found, exact = fast(llama), slow(llama)
    inside = torch.tensor([".inner." in layer.name for layer in find_layers(llama)])
    assert int(inside.sum()) == 3
    assert_near(found[:, inside], exact[:, inside].mean(0, keepdim=True).expand(WINDOWS, -1, -1))
    assert_near(found[:, ~inside], exact[:, ~inside])


def test_a_layer_that_is_never_called_has_zeros(llama: Any) -> None:
    for block in llama.model.layers:
        block.idle = nn.Linear(64, 16, bias=False).requires_grad_(requires_grad=False)
    idle = torch.tensor([layer.kind == "idle" for layer in find_layers(llama)])
    found = fast(llama)
    assert not found[:, idle].any()
    assert_near(found[:, ~idle], slow(llama)[:, ~idle])


def test_only_the_layers_asked_for_have_rows_in_their_order(llama: Any) -> None:
    layers, changes = find_layers(llama), random_changes(llama)
    chosen = [layers[9], layers[2]]
    found = inner_products(
        BlockRunner(llama), IDS, head_gradient, chosen, COUNT, changes.__getitem__
    )
    assert_near(found, slow(llama)[:, [9, 2]])


def test_nothing_is_left_in_the_model_even_after_an_error(llama: Any) -> None:
    def broken(_: Tensor) -> Tensor:
        raise ZeroDivisionError

    layers, changes = find_layers(llama), random_changes(llama)
    with pytest.raises(ZeroDivisionError):
        inner_products(BlockRunner(llama), IDS, broken, layers, COUNT, changes.__getitem__)
    fast(llama)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llama.modules())
    assert not any(
        parameter.requires_grad or parameter.grad is not None for parameter in llama.parameters()
    )
