"""Quantize the input embedding and the output head.

Both are tables with one row for each token. A head is quantized like a layer, by the second moments
of its inputs; so is a tied table, which serves as both. An embedding alone has no such moments,
because each token selects a row: its codes are rounded to nearest. Rows are independent of each
other, so a table is quantized some rows at a time.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantizer.errors import PlanError
from quantizer.modules.embedding import EMBED_SCALE_ATTRIBUTE
from quantizer.packed.layout import COLUMNS
from quantizer.packed.weight import QuantizedWeight
from quantizer.plans.fidelity import Fidelity
from quantizer.plans.plan import OUTSIDE_BLOCKS, LayerSpec
from quantizer.rounding.methods import quantize_layer
from quantizer.running.moments import head_moments
from quantizer.running.runner import BlockRunner
from quantizer.structure.blocks import find_blocks

EMBEDDING = "embedding"
HEAD = "head"
TIED = "embedding and head"
"""Kinds of tables, see `LayerSpec.kind`."""

EMBEDDING_FIDELITIES = tuple(
    Fidelity.parse(name) for name in ("int8g256s8", "int4g64s6", "int3g64s6")
)
"""Fidelities at which a table may be stored.

Each has a single code width: rows that are quantized separately must share their column order.
"""

_ROWS = 8192
"""Rows that are quantized at once.

A multiple of 32, so that the packed tensors of pieces can be concatenated.
"""


def find_embeddings(model: Any) -> tuple[LayerSpec, ...]:
    """Return the model's embedding and head, or one table if they are tied.

    Empty for a model whose embedding is no plain `nn.Embedding`, or whose head is no `nn.Linear`
    without bias.
    """
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    is_plain = type(embedding) is nn.Embedding or (
        isinstance(embedding, nn.Embedding) and hasattr(embedding, EMBED_SCALE_ATTRIBUTE)
    )
    if not is_plain or type(head) is not nn.Linear or head.bias is not None:
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
    """Quantize a table.

    Args:
        weight: [rows, hidden].
        moments: second moments of the states that the table is multiplied by, [hidden, hidden];
            None if its rows are only looked up.
        fidelity: one of `EMBEDDING_FIDELITIES`, or another of a single code width, without outliers
            and adapter.
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
    """Quantize some tables of an unquantized model.

    Args:
        runner: the model.
        fidelities: fidelity of each table, by name.
        batches: calibration windows, int64 [windows, tokens] each.

    Returns:
        The quantized tables by name.

    Raises:
        PlanError: the model has no such table.
    """
    quantized: dict[str, QuantizedWeight] = {}
    by_name = {table.name: table for table in find_embeddings(runner.model)}
    moments = None
    for name, fidelity in fidelities.items():
        if name not in by_name:
            raise unknown_table(name)
        is_multiplied = by_name[name].kind != EMBEDDING
        if is_multiplied and moments is None:
            moments = head_moments(runner, batches)
        weight = runner.model.get_submodule(name).get_parameter("weight").data
        quantized[name] = quantize_embedding(weight, moments if is_multiplied else None, fidelity)
    return quantized


def set_embedding_weights(model: Any, quantized: Mapping[str, QuantizedWeight]) -> None:
    """Overwrite tables of a model by their dequantized weights."""
    for name, table in quantized.items():
        weight = model.get_submodule(name).weight
        weight.data = table.to(weight.device).dequantize(weight.dtype)


def unknown_table(name: str) -> PlanError:
    """Return the error for a table that a model does not have."""
    return PlanError(
        f"the model has no embedding or head {name!r} that can be quantized; the plan was made for "
        "another model"
    )
