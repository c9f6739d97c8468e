"""What a checkpoint contains beside its quantized layers, in bytes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from allocator.errors import ProfileError
from quantizer.plans.fidelity import Fidelity
from quantizer.plans.plan import LayerSpec, Plan


@dataclass(frozen=True, slots=True)
class EmbeddingOption:
    """One way to store an embedding or a head.

    Attributes:
        embedding: the embedding or head.
        fidelity: None leaves it unquantized.
        weight_bytes: its exact size.
        loss: measured KL divergence that it adds, [nats/token].
    """

    embedding: LayerSpec
    fidelity: Fidelity | None
    weight_bytes: int
    loss: float


@dataclass(frozen=True, slots=True)
class Unquantized:
    """The part of a checkpoint's weight files that the budget of the layers does not count.

    Attributes:
        part_bytes: bytes of each part by name: `embedding`, `head` (or `embedding and head` where
            they are tied), `norms`, `biases`, `other`.
        header_bytes: an upper bound on the bytes of the file headers.
        embedding_options: for each embedding and head that was measured, the ways to store it, the
            unquantized one first; empty if none was measured.

    Raises:
        ProfileError: a number of bytes is negative.
    """

    part_bytes: Mapping[str, int]
    header_bytes: int
    embedding_options: tuple[tuple[EmbeddingOption, ...], ...] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot be a size."""
        for name, size in {**self.part_bytes, "headers": self.header_bytes}.items():
            if size < 0:
                raise ProfileError(f"the checkpoint has {size} bytes of {name}; profile it again")

    @property
    def total_bytes(self) -> int:
        """Bytes of all parts and headers, embedding and head unquantized."""
        return sum(self.part_bytes.values()) + self.header_bytes

    @property
    def without_embeddings_bytes(self) -> int:
        """Bytes of all but the embeddings that were measured."""
        return self.total_bytes - sum(options[0].weight_bytes for options in self.embedding_options)

    def bytes_beside(self, plan: Plan) -> int:
        """Return the bytes beside the layers of a plan that may quantize embedding and head too."""
        kept_bytes = sum(self.part_bytes.get(layer.kind, 0) for layer in plan.embeddings)
        quantized_bytes = plan.weight_bytes - plan.without_embeddings.weight_bytes
        return self.total_bytes - kept_bytes + quantized_bytes

    def to_json(self) -> dict[str, Any]:
        """Return a JSON document that `from_json` reads."""
        return {
            "part_bytes": dict(self.part_bytes),
            "header_bytes": self.header_bytes,
            "embeddings": [
                {"layer": _layer_to_json(options[0].embedding), "options": _rows(options)}
                for options in self.embedding_options
            ],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Unquantized":
        """Return what `to_json` described.

        Raises:
            KeyError, TypeError, ValueError, QuantizerError: the document is damaged.
        """
        return cls(
            {str(name): int(size) for name, size in values["part_bytes"].items()},
            int(values["header_bytes"]),
            tuple(
                tuple(_option(_layer_of(row["layer"]), option) for option in row["options"])
                for row in values["embeddings"]
            ),
        )


def _rows(options: Sequence[EmbeddingOption]) -> list[dict[str, Any]]:
    return [
        {
            "fidelity": option.fidelity.name if option.fidelity else None,
            "weight_bytes": option.weight_bytes,
            "loss": option.loss,
        }
        for option in options
    ]


def _option(embedding: LayerSpec, row: Mapping[str, Any]) -> EmbeddingOption:
    name = row["fidelity"]
    fidelity = None if name is None else Fidelity.parse(name)
    return EmbeddingOption(embedding, fidelity, int(row["weight_bytes"]), float(row["loss"]))


def _layer_to_json(layer: LayerSpec) -> dict[str, Any]:
    return {
        "name": layer.name,
        "block": layer.block,
        "kind": layer.kind,
        "shape": [layer.out_features, layer.in_features],
    }


def _layer_of(row: Mapping[str, Any]) -> LayerSpec:
    return LayerSpec(row["name"], row["block"], row["kind"], *row["shape"])
