"""What a checkpoint contains beside its quantized layers, and what a budget leaves to them."""

from collections.abc import Sequence

from allocator.demands.budget import Budget
from allocator.errors import BudgetInfeasible
from allocator.unquantized import Unquantized
from quantizer.plans.plan import LayerSpec
from service.stages.model_sizes import ModelSizes

_TENSORS_PER_LAYER = 7
_HEADER_BYTES_PER_TENSOR = 120
"""Upper bound of what a safetensors header states of a tensor besides the layer's name.

Tensor name, dtype, shape, offsets.
"""


def unquantized_of(
    sizes: ModelSizes, layers: Sequence[LayerSpec], tables: Sequence[LayerSpec]
) -> Unquantized:
    """Return what the checkpoint contains beside these layers.

    The headers of its files name more tensors than the original's: an upper bound is set aside for
    each quantized layer, and for each embedding and head that is quantized too.
    """
    header_bytes = sum(
        _TENSORS_PER_LAYER * (len(layer.name) + _HEADER_BYTES_PER_TENSOR)
        for layer in (*layers, *tables)
    )
    return Unquantized(sizes.part_bytes, header_bytes)


def rest_of_file(
    budget: Budget,
    file_bytes: int,
    sizes: ModelSizes,
    layers: Sequence[LayerSpec],
    tables: Sequence[LayerSpec] = (),
) -> int:
    """Return the bytes that a budget for the whole checkpoint leaves for what is quantized.

    Args:
        budget: as the user wrote it, for messages.
        file_bytes: the budget in bytes.
        sizes: bytes of the original by parts.
        layers: the layers to quantize.
        tables: embedding and head, where they are quantized too.

    Raises:
        BudgetInfeasible: it leaves nothing.
    """
    table_bytes = sizes.item_bytes * sum(table.weights for table in tables)
    others = unquantized_of(sizes, layers, tables).total_bytes - table_bytes
    left = file_bytes - others
    if left <= 0:
        raise BudgetInfeasible(
            f"budget {budget.text} is for the whole checkpoint, of which {others} bytes are not "
            "quantized (embeddings, head, norms, headers), so nothing is left for the layers; give "
            "more, or state the budget of the layers"
        )
    return left
