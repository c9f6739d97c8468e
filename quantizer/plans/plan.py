"""A plan: the fidelity of each layer of a model.

As a file it is plain JSON that a person can read and edit.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quantizer.errors import PlanError
from quantizer.plans.fidelity import Fidelity

SCHEMA = "bitwright.plan/1"

OUTSIDE_BLOCKS = -1
"""Stands for the block of embedding and head; see `quantizer.conversion.embeddings`."""


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One weight matrix that is quantized: a linear layer, an embedding or a head.

    Attributes:
        name: path of the module in the model, such as `model.layers.0.mlp.down_proj`.
        block: index of the decoder block that holds it, or `OUTSIDE_BLOCKS`.
        kind: path in the block, such as `mlp.down_proj`; the same in every block.
        out_features: rows of the weight.
        in_features: columns of the weight.
    """

    name: str
    block: int
    kind: str
    out_features: int
    in_features: int

    @property
    def weights(self) -> int:
        """Number of weights in the layer."""
        return self.out_features * self.in_features


def starred(path: str) -> str:
    """Return a path of modules with `*` for each number, so that all experts have one name."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def by_block(layers: Iterable[LayerSpec]) -> dict[int, tuple[LayerSpec, ...]]:
    """Return the layers of each block by the block's index, in ascending order of the indices.

    Layers of a block keep their order. Blocks that hold none of the layers are absent.
    """
    members: dict[int, list[LayerSpec]] = {}
    for layer in layers:
        members.setdefault(layer.block, []).append(layer)
    return {index: tuple(members[index]) for index in sorted(members)}


@dataclass(frozen=True, slots=True)
class Plan:
    """The fidelity of each layer, in the order of the layers.

    Attributes:
        layers: decoder layers in the order of the model, then embedding and head if quantized.
        fidelities: of each layer.

    Raises:
        PlanError: there are no layers, or the two tuples differ in length.
    """

    layers: tuple[LayerSpec, ...]
    fidelities: tuple[Fidelity, ...]

    def __post_init__(self) -> None:
        """Check that there are layers, each with a fidelity."""
        if not self.layers or len(self.layers) != len(self.fidelities):
            raise PlanError(
                f"a plan of {len(self.layers)} layers and {len(self.fidelities)} fidelities; they "
                "must agree"
            )

    @classmethod
    def uniform(cls, layers: Iterable[LayerSpec], fidelity: Fidelity) -> "Plan":
        """Return the plan that stores every layer at `fidelity`."""
        layers = tuple(layers)
        return cls(layers, (fidelity,) * len(layers))

    @property
    def without_embeddings(self) -> "Plan":
        """The same plan for the layers in decoder blocks only."""
        inside = [at for at, layer in enumerate(self.layers) if layer.block != OUTSIDE_BLOCKS]
        return Plan(
            tuple(self.layers[at] for at in inside), tuple(self.fidelities[at] for at in inside)
        )

    @property
    def embeddings(self) -> dict[LayerSpec, Fidelity]:
        """Fidelities of the matrices outside the decoder blocks: embedding and head."""
        pairs = zip(self.layers, self.fidelities, strict=True)
        return {layer: fidelity for layer, fidelity in pairs if layer.block == OUTSIDE_BLOCKS}

    def with_embeddings(self, embeddings: Mapping[LayerSpec, Fidelity]) -> "Plan":
        """Return the plan with embedding and head after its layers."""
        return Plan((*self.layers, *embeddings), (*self.fidelities, *embeddings.values()))

    @property
    def by_name(self) -> dict[str, Fidelity]:
        """The fidelity of each layer, by the name of the layer."""
        return {
            layer.name: fidelity
            for layer, fidelity in zip(self.layers, self.fidelities, strict=True)
        }

    @property
    def layer_bytes(self) -> tuple[int, ...]:
        """Exact bytes of each layer."""
        pairs = zip(self.layers, self.fidelities, strict=True)
        return tuple(
            fidelity.weight_bytes(layer.out_features, layer.in_features)
            for layer, fidelity in pairs
        )

    @property
    def weight_bytes(self) -> int:
        """Exact bytes of all quantized tensors."""
        return sum(self.layer_bytes)

    @property
    def bits_per_weight(self) -> float:
        """Mean bits of a quantized weight; all stored tensors of a layer count, not only codes."""
        return 8 * self.weight_bytes / sum(layer.weights for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values, from which `from_json` returns the same plan."""
        rows = zip(self.layers, self.fidelities, self.layer_bytes, strict=True)
        return {
            "schema": SCHEMA,
            "weight_bytes": self.weight_bytes,
            "bits_per_weight": self.bits_per_weight,
            "layers": {
                layer.name: {
                    "fidelity": fidelity.name,
                    "block": layer.block,
                    "kind": layer.kind,
                    "shape": [layer.out_features, layer.in_features],
                    "weight_bytes": size,
                }
                for layer, fidelity, size in rows
            },
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Plan":
        """Return the plan in JSON values that `to_json` returned, or that a person edited.

        Byte counts in the values are ignored and computed again from the fidelities.

        Raises:
            PlanError: the schema is another one, or a field is missing or of the wrong kind.
            FidelityError: the fidelity of a layer does not exist.
        """
        if values.get("schema") != SCHEMA:
            raise PlanError(f"plan schema {values.get('schema')!r}; this version reads {SCHEMA!r}")
        layers, fidelities = [], []
        try:
            for name, row in values["layers"].items():
                out_features, in_features = _shape(row["shape"])
                fidelity = Fidelity.parse(row["fidelity"])
                layers.append(
                    LayerSpec(name, int(row["block"]), str(row["kind"]), out_features, in_features)
                )
                fidelities.append(fidelity)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as err:
            raise PlanError(
                f"plan layer {len(layers)}: field {err} is missing or of the wrong kind"
            ) from err
        return cls(tuple(layers), tuple(fidelities))

    @classmethod
    def loads(cls, text: str) -> "Plan":
        """Return the plan in the JSON document `text`.

        Raises:
            PlanError: the text is not a JSON object, or not a plan.
        """
        try:
            values = json.loads(text)
        except ValueError as err:
            raise PlanError(f"the plan is not JSON: {err}") from err
        if not isinstance(values, dict):
            raise PlanError(f"the plan is a JSON {type(values).__name__}; it must be an object")
        return cls.from_json(values)


def _shape(values: object) -> tuple[int, int]:
    """Return the shape in a list of two positive whole numbers.

    Raises:
        ValueError: the value is something else.
    """
    match values:
        case [int(out_features), int(in_features)] if out_features > 0 and in_features > 0:
            return out_features, in_features
    raise ValueError(f"shape {values!r}")
