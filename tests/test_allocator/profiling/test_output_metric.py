"""The output metric predicts the KL divergence of a changed output from the original's."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from allocator.profiling.output_metric import OutputMetric, output_metric
from quantizer.models.loading import load_model
from quantizer.models.source import find_model
from quantizer.running.runner import BlockRunner
from tests.support.tiny_models import VOCABULARY, save_tiny

WIDTH = 64
TOKENS = 8 * 64


@dataclass(frozen=True)
class Case:
    """A model, the input of its head in the original and in a context, and the context's metric."""

    runner: BlockRunner
    windows: Tensor
    original: Tensor
    context: Tensor
    metric: OutputMetric

    def log_probs(self, head_input: Tensor) -> Tensor:
        """Return the log of the next-token distributions, float64 [N, vocabulary]."""
        with torch.no_grad():
            logits = self.runner.logits(self.windows, head_input)
            return logits.double().log_softmax(-1).flatten(0, 1)

    def divergence(self, head_input: Tensor) -> Tensor:
        """Return KL(original || what `head_input` gives) of each token, [N]."""
        log_q = self.log_probs(self.original)
        return (log_q.exp() * (log_q - self.log_probs(head_input))).sum(-1)

    def random_change(self, size: float, seed: int) -> Tensor:
        """Return a random change of the head's input, `size` times as large as it, [N, hidden]."""
        noise = torch.randn(self.context.shape, generator=torch.Generator().manual_seed(seed))
        return (size * self.context.std() * noise).flatten(0, 1)

    def metric_at(self, context: Tensor, width: int, seed: int) -> OutputMetric:
        """Return the metric of another context, width or seed."""
        return output_metric(
            self.runner,
            self.windows,
            context,
            self.original,
            width,
            torch.Generator().manual_seed(seed),
        )

    def moved(self, change: Tensor) -> Tensor:
        return self.context + change.view_as(self.context)


@pytest.fixture(scope="module", params=["llama", "opt"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = save_tiny(tmp_path_factory.mktemp("metric") / request.param, request.param)
    runner = BlockRunner(load_model(find_model(str(folder), folder), torch.float32, "cpu"))
    windows = torch.randint(VOCABULARY, (8, 64), generator=torch.Generator().manual_seed(0))
    original = runner.final_states(windows)
    noise = torch.randn(original.shape, generator=torch.Generator().manual_seed(1))
    context = original + 0.1 * original.std() * noise
    metric = output_metric(
        runner, windows, context, original, WIDTH, torch.Generator().manual_seed(2)
    )
    return Case(runner, windows, original, context, metric)


def second_order(case: Case, change: Tensor, other: Tensor) -> Tensor:
    """Return dz_1' F dz_2 of each token, [N].

    This is the covariance of two changes of the logits under the context's distribution.
    """
    weight = case.runner.head.weight.detach().double()
    first, second = change.double() @ weight.t(), other.double() @ weight.t()
    p = case.log_probs(case.context).exp()
    return (p * first * second).sum(-1) - (p * first).sum(-1) * (p * second).sum(-1)


def test_the_context_has_its_divergence_from_the_original(case: Case) -> None:
    exact = case.divergence(case.context)
    assert exact.mean() > 0.003
    assert case.metric.kl.shape == (TOKENS,)
    torch.testing.assert_close(case.metric.kl.double(), exact, rtol=1e-3, atol=1e-6)


def test_the_original_has_no_divergence_and_no_slope(case: Case) -> None:
    metric = case.metric_at(case.original, 1, 0)
    assert metric.kl.abs().max() < 1e-6
    assert metric.gradient.abs().max() < 1e-5


def test_windows_are_measured_one_at_a_time(case: Case) -> None:
    seen: list[int] = []
    handle = case.runner.head.register_forward_hook(lambda *given: seen.append(len(given[-1])))
    again = case.metric_at(case.context, WIDTH, 2)
    handle.remove()
    assert set(seen) == {1}
    assert again.projection.equal(case.metric.projection)


def test_no_change_has_no_effect(case: Case) -> None:
    first, sketch = case.metric.measure(torch.zeros(TOKENS, case.context.shape[-1]))
    assert first.shape == (TOKENS,)
    assert sketch.shape == (TOKENS, WIDTH)
    assert not first.any()
    assert not sketch.any()


def test_the_first_order_is_the_slope_of_the_divergence(case: Case) -> None:
    change = case.random_change(1e-3, 3)
    exact = (case.divergence(case.moved(change)) - case.divergence(case.moved(-change))) / 2
    first, _ = case.metric.measure(change)
    assert (first - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("size", [0.03, 0.1])
def test_both_orders_predict_the_divergence_of_a_small_change(case: Case, size: float) -> None:
    change = case.random_change(size, 4)
    exact = case.divergence(case.moved(change)).sum() - case.divergence(case.context).sum()
    first, sketch = case.metric.measure(change)
    second = sketch.square().sum() / 2
    assert second > 0.2 * exact  # the slope alone would not do
    assert float(first.sum() + second) == pytest.approx(float(exact), rel=0.05)


def test_the_squared_sketch_is_the_second_order_term(case: Case) -> None:
    change = case.random_change(0.1, 5)
    exact = second_order(case, change, change)
    _, sketch = case.metric.measure(change)
    assert float(sketch.square().sum()) == pytest.approx(float(exact.sum()), rel=0.05)


def test_inner_products_of_sketches_are_the_coupling_of_changes(case: Case) -> None:
    left, noise = case.random_change(0.1, 6), case.random_change(0.1, 7)
    right = left + noise
    exact = float(second_order(case, left, right).sum())
    product = float((case.metric.measure(left)[1] * case.metric.measure(right)[1]).sum())
    apart = float((case.metric.measure(left)[1] * case.metric.measure(noise)[1]).sum())
    assert product == pytest.approx(exact, rel=0.05)
    assert apart == pytest.approx(float(second_order(case, left, noise).sum()), abs=0.05 * exact)


def test_the_squared_sketch_is_right_on_average_at_any_width(case: Case) -> None:
    change = case.random_change(0.1, 8)
    exact = float(second_order(case, change, change).sum())
    found = [
        float(case.metric_at(case.context, 2, seed).measure(change)[1].square().sum())
        for seed in range(20)
    ]
    assert sum(found) / len(found) == pytest.approx(exact, rel=0.05)


def test_a_shift_of_all_logits_does_not_count(case: Case) -> None:
    weight = case.runner.head.weight.detach()
    # The change that raises all logits most evenly.
    even = torch.linalg.lstsq(weight, torch.ones(len(weight), 1)).solution.t()
    change = even.expand(TOKENS, -1)
    exact = second_order(case, change, change).sum()
    common = (case.log_probs(case.context).exp() @ (weight @ even.t()).double()).square().sum()
    _, sketch = case.metric.measure(change)
    assert common > 0.15 * exact
    assert float(sketch.square().sum()) == pytest.approx(float(exact), rel=0.05)


def test_the_seed_decides_the_projection(case: Case) -> None:
    one, same, other = (case.metric_at(case.context, 2, seed) for seed in (9, 9, 10))
    assert torch.equal(one.projection, same.projection)
    assert not torch.equal(one.projection, other.projection)
    assert torch.equal(one.gradient, other.gradient)
