"""Turn a transformers model into its packed form, in place."""

from collections.abc import Mapping
from typing import Any

from quantizer.conversion.embeddings import HEAD, TIED, find_embeddings, unknown_table
from quantizer.conversion.transformers_format import BitwrightConfig, BitwrightQuantizer
from quantizer.errors import CheckpointError
from quantizer.modules.embedding import QuantizedEmbedding, TiedHead
from quantizer.modules.linear import QuantizedLinear, pack_layers, replace_linear
from quantizer.packed.weight import QuantizedWeight
from quantizer.plans.plan import Plan


def pack_model(model: Any, plan: Plan, weights: Mapping[str, QuantizedWeight]) -> None:
    """Replace the planned layers, embeddings and heads of a model by packed ones, in place.

    The model is then ready to be saved or run.

    Args:
        model: a model of the original's class with the original's unquantized parameters; the
            weights of planned layers are dropped.
        plan: fidelity of every quantized layer.
        weights: every quantized layer by name.

    Raises:
        CheckpointError: a layer has another fidelity than the plan says.
        PlanError: the model has no such layer.
    """
    for name, fidelity in plan.by_name.items():
        if weights[name].fidelity != fidelity:
            raise CheckpointError(
                f"layer {name!r} is stored as {weights[name].fidelity.name}, the plan says "
                f"{fidelity.name}"
            )
    tied = pack_embeddings(model, {table.name: weights[table.name] for table in plan.embeddings})
    pack_layers(model, {name: weights[name] for name in plan.without_embeddings.by_name})
    fidelities = {name: fidelity.name for name, fidelity in plan.by_name.items()}
    config = BitwrightConfig(fidelities, tied=tied)
    model.config.quantization_config = config
    model.hf_quantizer = BitwrightQuantizer(config)
    model.is_quantized = True


def pack_embeddings(model: Any, weights: Mapping[str, QuantizedWeight]) -> dict[str, str]:
    """Replace embeddings and heads of a model by packed ones, in place.

    Returns:
        For each head that shares an embedding's table, the embedding's name by the head's. A loader
        needs it.

    Raises:
        PlanError: the model has no such embedding or head.
    """
    kinds = {table.name: table.kind for table in find_embeddings(model)}
    tied: dict[str, str] = {}
    for name, weight in weights.items():
        if name not in kinds:
            raise unknown_table(name)
        module = model.get_submodule(name)
        if kinds[name] == HEAD:
            replace_linear(model, name, QuantizedLinear.from_linear(module, weight))
            continue
        packed = QuantizedEmbedding.from_embedding(module, weight)
        if kinds[name] == TIED:
            tied[_tie_head(model, packed)] = name
        replace_linear(model, name, packed)
    return tied


def _tie_head(model: Any, embedding: QuantizedEmbedding) -> str:
    """Replace the model's head by one that uses the table of an embedding, and return its name."""
    head = model.get_output_embeddings()
    name = next(path for path, module in model.named_modules() if module is head)
    replace_linear(model, name, TiedHead(embedding))
    model.config.tie_word_embeddings = False  # nothing is left that transformers could tie
    model.all_tied_weights_keys = {}
    return str(name)
