"""Tables: the matrices with a row for each token, at the two ends of a model.

The input embedding and the output head.

A head is quantized like a layer, by the moments of what enters it; so is a table that serves as
both. An embedding alone has no moments, as each token picks a row: it is rounded. Rows know nothing
of each other, so a table is quantized some rows at a time.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantizer.errors import PlanError
from quantizer.kernels.precision import matmul_autocast
from quantizer.modules.embedding import EMBED_SCALE_ATTRIBUTE, QuantizedEmbedding, TiedHead
from quantizer.modules.linear import QuantizedLinear, replace_linear
from quantizer.packed.layout import COLUMNS
from quantizer.packed.weight import QuantizedWeight
from quantizer.plans.fidelity import Fidelity
from quantizer.plans.plan import OUTSIDE_BLOCKS, LayerSpec
from quantizer.rounding.methods import quantize_layer
from quantizer.running.evaluate import next_token_logits, window_divergence
from quantizer.running.moments import head_moments
from quantizer.running.runner import BlockRunner
from quantizer.running.structure import find_blocks

EMBEDDING, HEAD, TIED = "embedding", "head", "embedding and head"
"""What a table is; the `kind` of its specification."""

EMBEDDING_FIDELITIES = tuple(
    Fidelity.parse(name) for name in ("int8g256s8", "int4g64s6", "int3g64s6")
)
"""How a table may be stored.

All have one code width: rows that are quantized apart must share their column order.
"""

_UNKNOWN = "the model has no table {!r} that can be quantized; the plan was made for another model"

_ROWS = 8192
"""Rows that are quantized at once.

A multiple of 32, so that packed tensors of pieces can be joined.
"""


def find_embeddings(model: Any) -> tuple[LayerSpec, ...]:
    """Return the model's embedding and head, once if they are tied.

    Nothing for a model whose ends are of another form.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    plain = type(embedding) is nn.Embedding or (
        isinstance(embedding, nn.Embedding) and hasattr(embedding, EMBED_SCALE_ATTRIBUTE)
    )
    if not plain or type(head) is not nn.Linear or head.bias is not None:
        return ()
    names = {id(module): name for name, module in model.named_modules()}
    blocks = find_blocks(model)[0]
    if any(names[id(table)].startswith(f"{blocks}.") for table in (embedding, head)):
        return ()
    shape = tuple(embedding.weight.shape)
    if head.weight is embedding.weight:
        return (LayerSpec(names[id(embedding)], OUTSIDE_BLOCKS, TIED, *shape),)
    return (
        LayerSpec(names[id(embedding)], OUTSIDE_BLOCKS, EMBEDDING, *shape),
        LayerSpec(names[id(head)], OUTSIDE_BLOCKS, HEAD, *head.weight.shape),
    )


def quantize_embedding(
    weight: Tensor, moments: Tensor | None, fidelity: Fidelity
) -> QuantizedWeight:
    """Quantize a table at a fidelity of one code width.

    Args:
        weight: [rows, hidden].
        moments: of what the table is multiplied with, [hidden, hidden]; None if its rows are looked
            up only.
        fidelity: one of `EMBEDDING_FIDELITIES`, or another of one code width, without outliers and adapter.
    """
    if moments is None:
        moments = torch.zeros(weight.shape[1], weight.shape[1], device=weight.device)
    pieces = [
        quantize_layer(piece.float(), moments, fidelity) for piece in torch.split(weight, _ROWS)
    ]
    tensors = {COLUMNS: pieces[0].tensors[COLUMNS]}
    for name, tensor in pieces[0].tensors.items():
        if name != COLUMNS:
            tensors[name] = torch.cat([piece.tensors[name] for piece in pieces], tensor.dim() - 1)
    rows, hidden = weight.shape
    return QuantizedWeight(fidelity, rows, hidden, tensors)


def quantize_embeddings(
    runner: BlockRunner, fidelities: Mapping[str, Fidelity], batches: Sequence[Tensor]
) -> dict[str, QuantizedWeight]:
    """Quantize some tables of a model that is otherwise as it was.

    Args:
        runner: the model.
        fidelities: how to store them, by name.
        batches: calibration windows, int64 [windows, tokens] each.

    Raises:
        PlanError: the model has no such table.
    """
    found: dict[str, QuantizedWeight] = {}
    kinds = {spec.name: spec.kind for spec in find_embeddings(runner.model)}
    moments = None
    for name, fidelity in fidelities.items():
        if name not in kinds:
            raise PlanError(_UNKNOWN.format(name))
        if kinds[name] != EMBEDDING and moments is None:
            moments = head_moments(runner, batches)
        weight: Tensor = runner.model.get_submodule(name).weight.data  # type: ignore[assignment]
        found[name] = quantize_embedding(
            weight, None if kinds[name] == EMBEDDING else moments, fidelity
        )
    return found


def set_embedding_weights(model: Any, tables: Mapping[str, QuantizedWeight]) -> None:
    """Overwrite tables of a model by what their stored forms stand for."""
    for name, form in tables.items():
        weight = model.get_submodule(name).weight
        weight.data = form.to(weight.device).dequantize(weight.dtype)


def embedding_losses(
    model: Any, changed: Sequence[Mapping[str, Tensor]], windows: Tensor, precision: torch.dtype
) -> list[float]:
    """Return KL(original || model) with some tables replaced, for each of some replacements, [nats/token].

    It is the figure that `quantizer.running.evaluate` scores models by.

    Args:
        model: the original; it is left as it was.
        changed: for each replacement the new weights by name.
        windows: int64 [windows, tokens], one at a time.
        precision: dtype of the matrix products.
    """
    totals = [0.0] * len(changed)
    with torch.inference_mode(), matmul_autocast(precision, windows.device):
        for window in torch.split(windows, 1):
            reference = next_token_logits(model, window)[0]
            for at, weights in enumerate(changed):
                with _replaced(model, weights):
                    totals[at] += window_divergence(reference, next_token_logits(model, window)[0])
    return [total / len(windows) for total in totals]


@contextmanager
def _replaced(model: Any, weights: Mapping[str, Tensor]) -> Iterator[None]:
    before = {name: model.get_submodule(name).weight.data for name in weights}
    try:
        for name, weight in weights.items():
            model.get_submodule(name).weight.data = weight
        yield
    finally:
        for name, weight in before.items():
            model.get_submodule(name).weight.data = weight


def pack_embeddings(model: Any, weights: Mapping[str, QuantizedWeight]) -> dict[str, str]:
    """Replace tables of a model by their packed twins, in place.

    Returns:
        for each head that shares an embedding's table the embedding's name, by the head's; a loader
        needs to know.

    Raises:
        PlanError: the model has no such table.
    """
    by_name = {spec.name: spec for spec in find_embeddings(model)}
    tied: dict[str, str] = {}
    for name, weight in weights.items():
        if name not in by_name:
            raise PlanError(_UNKNOWN.format(name))
        module = model.get_submodule(name)
        if by_name[name].kind == HEAD:
            replace_linear(model, name, QuantizedLinear.from_linear(module, weight))
            continue
        packed = QuantizedEmbedding.from_embedding(module, weight)
        if by_name[name].kind == TIED:
            head = next(
                path
                for path, each in model.named_modules()
                if each is model.get_output_embeddings()
            )
            tied[head] = name
            replace_linear(model, head, TiedHead(packed))
            model.config.tie_word_embeddings = (
                False  # there is nothing left that transformers could tie
            )
            model.all_tied_weights_keys = {}
        replace_linear(model, name, packed)
    return tied
