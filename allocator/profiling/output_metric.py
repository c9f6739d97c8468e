"""How much a change of the model's output matters, in a few numbers per token.

Near a context with next-token distribution p, the KL divergence from the original distribution q
changes with a change dz of the logits by

    (p - q) . dz + 1/2 dz' F dz + ...,    F = diag(p) - p p'  (the Fisher metric of the softmax)

The logits are a function of the input of the output head. Both terms are pulled back to that input
once. A change dh of the head's input then costs a product with [hidden] + [hidden, width] numbers
for each token; neither the head nor a softmax is computed again. The metric is factored as F = A
A', A = diag(sqrt p) - p sqrt(p)', and A is multiplied by a fixed random sign matrix of `width`
columns. Inner products of sketched changes are unbiased estimates of dz_1' F dz_2.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from quantizer.running.memory import MicroBatches
from quantizer.running.runner import BlockRunner


@dataclass(frozen=True, slots=True)
class OutputMetric:
    """The two pulled-back terms on N tokens.

    Attributes:
        kl: KL(original || context) of each token, float32 [N], [nats].
        gradient: float32 [N, hidden].
        projection: float32 [N, hidden, width].
    """

    kl: Tensor
    gradient: Tensor
    projection: Tensor

    def measure(self, change: Tensor) -> tuple[Tensor, Tensor]:
        """Return (first-order KL change, sketch) of a change of the head's input.

        Args:
            change: float32 [N, hidden].

        Returns:
            float32 [N] in nats, and float32 [N, width] with |sketch|^2 an estimate of the
            second-order term dz' F dz.
        """
        first = (self.gradient * change).sum(-1)
        return first, torch.einsum("nh,nhw->nw", change, self.projection)


def output_metric(
    runner: BlockRunner,
    input_ids: Tensor,
    context: Tensor,
    original: Tensor,
    width: int,
    generator: torch.Generator,
) -> OutputMetric:
    """Return the metric of probe windows, computed one window at a time.

    Logits, and what is computed from them, need much memory.

    Args:
        runner: the model; only its output head is used.
        input_ids: int64 [windows, tokens].
        context: input of the head in the context, [windows, tokens, hidden].
        original: input of the head in the original model, [windows, tokens, hidden].
        width: numbers per token in a sketch.
        generator: source of the random signs, on the CPU.

    Raises:
        MemoryShort: the device has too little memory for one window.
    """

    def measure(some: slice) -> OutputMetric:
        return _window_metric(
            runner, input_ids[some], context[some], original[some], width, generator
        )

    metrics = MicroBatches(1).run(measure, len(input_ids))
    return OutputMetric(
        *(
            torch.cat([getattr(metric, field.name) for metric in metrics])
            for field in fields(OutputMetric)
        )
    )


def _window_metric(
    runner: BlockRunner,
    input_ids: Tensor,
    context: Tensor,
    original: Tensor,
    width: int,
    generator: torch.Generator,
) -> OutputMetric:
    """Return the metric of one window; arguments as in `output_metric`."""
    with torch.no_grad():
        log_q = runner.logits(input_ids, original).float().log_softmax(-1)
    with torch.enable_grad():
        leaf = context.detach().clone().requires_grad_()
        logits = runner.logits(input_ids, leaf)
    log_p = logits.detach().float().log_softmax(-1)
    p = log_p.exp()
    root = (log_p / 2).exp()

    def pull_back(cotangent: Tensor) -> Tensor:
        (pulled,) = torch.autograd.grad(logits, leaf, cotangent.to(logits.dtype), retain_graph=True)
        return pulled.float().flatten(0, 1)

    gradient = pull_back(p - log_q.exp())
    columns: list[Tensor] = []
    for _ in range(width):
        bits = torch.randint(0, 2, p.shape, generator=generator, dtype=torch.int8)
        column = root * (bits.to(p.device) * 2 - 1)
        columns.append(pull_back(column - p * column.sum(-1, keepdim=True)))
    projection = torch.stack(columns, -1) / width**0.5
    kl = (log_q.exp() * (log_q - log_p)).sum(-1).flatten()
    return OutputMetric(kl, gradient, projection)
