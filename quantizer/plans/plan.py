"""A plan says at which fidelity each layer is stored.

It is plain JSON that a person can read, edit and share.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quantizer.errors import PlanError
from quantizer.plans.fidelity import Fidelity

SCHEMA = "bitwright.plan/1"

OUTSIDE_BLOCKS = -1
"""The block of a matrix that is in no decoder block, see `quantizer.conversion.embeddings`."""


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One linear layer that is quantized, or another matrix.

    Attributes:
        name: path of the module inside the model.
        block: index of the decoder block that holds it, or `OUTSIDE_BLOCKS`.
        kind: path inside the block, such as `mlp.down_proj`; the same in every block.
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
    """One fidelity for each layer, in the order of the layers.

    Raises:
        PlanError: there are no layers, or the two tuples differ in length.
    """

    layers: tuple[LayerSpec, ...]
    fidelities: tuple[Fidelity, ...]

    def __post_init__(self) -> None:
        """Refuse a plan with nothing in it, or with a layer left over."""
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
        """The part of the plan that is about decoder blocks."""
        kept = [at for at, layer in enumerate(self.layers) if layer.block != OUTSIDE_BLOCKS]
        return Plan(
            tuple(self.layers[at] for at in kept), tuple(self.fidelities[at] for at in kept)
        )

    @property
    def embeddings(self) -> dict[LayerSpec, Fidelity]:
        """Fidelities of the matrices outside of decoder blocks, see `quantizer.conversion.embeddings`."""
        pairs = zip(self.layers, self.fidelities, strict=True)
        return {layer: fidelity for layer, fidelity in pairs if layer.block == OUTSIDE_BLOCKS}

    def with_embeddings(self, embeddings: Mapping[LayerSpec, Fidelity]) -> "Plan":
        """Return the plan with further matrices after its layers."""
        return Plan((*self.layers, *embeddings), (*self.fidelities, *embeddings.values()))

    @property
    def by_name(self) -> dict[str, Fidelity]:
        """Fidelity of each layer by the layer's name."""
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
        """Average bits of a quantized weight, with scales, zero points and permutations."""
        return 8 * self.weight_bytes / sum(layer.weights for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values; `from_json` reads them back."""
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
        """Return the plan that `to_json` wrote.

        Byte counts are computed anew, so edited fidelities are priced correctly.

        Raises:
            PlanError: the schema is another one, or a field is missing or of the wrong kind.
            FidelityError: a layer names a fidelity that does not exist.
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
    """Return two positive whole numbers.

    Raises:
        ValueError: the values are something else.
    """
    match values:
        case [int(out_features), int(in_features)] if out_features > 0 and in_features > 0:
            return out_features, in_features
    raise ValueError(f"shape {values!r}")
