"""The profile of a model: a measured model of the loss of every plan.

The loss is the KL divergence from the original model on probe text. It is modelled around a
context, which is a uniform plan or the original model. With x[l, k] = 1 if layer l has fidelity k,
and 0 otherwise,

    loss(x) = context_loss + linear . x + 1/2 |factor x|^2      [nats/token]

Column (l, k) of `factor` is the effect of this one change on the model's output. The Gram matrix
factor' factor is therefore the coupling of all pairs of layers, and positive semidefinite by
construction. It is empty for a signal that assumes that damages add up. The columns of the
context's own fidelity are zero.
"""

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allocator.errors import ProfileError
from allocator.signals import reach_of
from allocator.unquantized import Unquantized
from quantizer.errors import QuantizerError
from quantizer.plans.fidelity import Fidelity
from quantizer.plans.plan import LayerSpec, Plan

SCHEMA = "bitwright.profile/2"
COUPLINGS = ("none", "block", "full")
"""Which pairs of layers a plan couples: no pair, pairs within a block, all pairs."""

_UNREADABLE = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OSError,
    EOFError,
    QuantizerError,
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,
    RuntimeError,
    OverflowError,
    SyntaxError,
)
"""What reading damaged documents can raise, including the zip archive of the arrays."""

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Profile:
    """A model of the loss of all plans of L layers with K fidelities; see the module.

    Attributes:
        signal: name of the signal that was measured, one of `allocator.signals.SIGNALS` or of
            another version of this program.
        layers: the layers, in order.
        fidelities: the menu, in order.
        context: index in the menu of the context's fidelity; None if the context is the original
            model.
        context_loss: KL divergence of the context, [nats/token].
        linear: float64 [L, K], [nats/token].
        factor: float64 [rank, L * K], layer-major, [sqrt(nats/token)].
        truncation: share of the products between layers that the rank leaves out, see
            `allocator.profiling.coupling`.
        tokens: number of probe tokens that the signal was measured on.
        model_sha256: digest of the model.
        calibration_sha256: digest of the windows that layers were quantized on.
        unquantized: what the checkpoint contains beside the layers; None in profiles of earlier
            versions, which did not store it.

    Raises:
        ProfileError: shapes disagree, a value is not finite, or a layer has no bytes; the message
            names the layer.
    """

    signal: str
    layers: tuple[LayerSpec, ...]
    fidelities: tuple[Fidelity, ...]
    context: int | None
    context_loss: float
    linear: Array
    factor: Array
    truncation: float
    tokens: int
    model_sha256: str
    calibration_sha256: str
    unquantized: Unquantized | None = None

    def __post_init__(self) -> None:
        """Refuse values that the allocation program cannot be built from."""
        shape = (len(self.layers), len(self.fidelities))
        columns = shape[0] * shape[1]
        if self.linear.shape != shape or self.factor.ndim != 2 or self.factor.shape[1] != columns:  # noqa: PLR2004
            raise ProfileError(
                f"effects have the shapes {self.linear.shape} and {self.factor.shape}, which do "
                f"not fit {shape[0]} layers and {shape[1]} fidelities; profile the model again"
            )
        finite = np.isfinite(self.linear) & np.isfinite(self.factor).all(axis=0).reshape(shape)
        if not finite.all():
            layer = self.layers[int(np.argwhere(~finite)[0, 0])]
            raise ProfileError(
                f"effects of layer {layer.name!r} are not finite; profile the model again"
            )
        for layer in self.layers:
            if layer.out_features < 1 or layer.in_features < 1:
                raise ProfileError(
                    f"layer {layer.name!r} has the shape {layer.out_features} x "
                    f"{layer.in_features}, which has no bytes"
                )
        if not isinstance(self.context_loss, float) or not np.isfinite(self.context_loss):
            raise ProfileError(
                f"context loss {self.context_loss!r} is not a finite number; profile the model "
                "again"
            )
        if not isinstance(self.signal, str) or not isinstance(self.context, int | None):
            raise ProfileError(
                f"signal {self.signal!r} with context {self.context!r}: the signal must be a "
                "name, the context an index or null"
            )
        if self.context is not None and not 0 <= self.context < shape[1]:
            raise ProfileError(
                f"context {self.context} is not on the menu of {shape[1]} fidelities"
            )

    @property
    def weight_bytes(self) -> NDArray[np.int64]:
        """Exact bytes of each layer at each fidelity, [L, K]."""
        return layer_sizes(self.layers, self.fidelities)

    @property
    def digest(self) -> str:
        """The profile's identity: `profile_digest` of what `dumps` returns."""
        return profile_digest(*self.dumps())

    @property
    def budget_range(self) -> tuple[int, int]:
        """Smallest and largest plan whose loss the profile predicts, in bytes.

        Plans further from the context than the signal's reach are not predicted. The range is 0, 0
        if the context is the original model: then no quantized plan is near the context.
        """
        sizes = self.weight_bytes
        if self.context is None:
            return 0, 0
        middle = int(sizes[:, self.context].sum())
        reach = reach_of(self.signal)
        return int(middle * (1 - reach.below)), int(middle * (1 + reach.above))

    def with_coupling(self, coupling: str) -> "Profile":
        """Return the profile with less coupling. Single changes keep their damage.

        Args:
            coupling: one of `COUPLINGS`. `none` keeps each layer's own effect, `block` also keeps
                the coupling of layers of the same block, `full` is the profile itself.

        Raises:
            ProfileError: `coupling` is not one of these.
        """
        if coupling not in COUPLINGS:
            raise ProfileError(
                f"coupling {coupling!r} does not exist; use one of {', '.join(COUPLINGS)}"
            )
        if coupling == "full" or not len(self.factor):
            return self
        if coupling == "none":
            return replace(self, linear=self.damage(), factor=np.zeros((0, self.factor.shape[1])))
        columns = self.factor.reshape(len(self.factor), *self.linear.shape)
        parts = []
        for block in sorted({layer.block for layer in self.layers}):
            inside = np.array([layer.block == block for layer in self.layers])
            triangle = np.linalg.qr(columns[:, inside].reshape(len(columns), -1)).R
            part = np.zeros((len(triangle), *self.linear.shape))
            part[:, inside] = triangle.reshape(len(triangle), int(inside.sum()), -1)
            parts.append(part.reshape(len(triangle), -1))
        return replace(self, factor=np.concatenate(parts))

    def damage(self) -> Array:
        """Return the loss change of each single change from the context, [L, K], [nats/token]."""
        own = np.square(self.factor).sum(axis=0).reshape(self.linear.shape)
        return np.asarray(self.linear + own / 2, dtype=np.float64)

    def loss(self, choice: Sequence[int] | NDArray[np.int64]) -> float:
        """Return the predicted loss of a plan, [nats/token].

        Args:
            choice: menu index of each layer, [L].
        """
        share = np.zeros(self.linear.shape)
        share[np.arange(len(self.layers)), np.asarray(choice)] = 1
        return self.loss_of_shares(share)

    def loss_of_shares(self, share: Array) -> float:
        """Return the predicted loss of a mix of fidelities, [nats/token].

        Args:
            share: share of each fidelity in each layer, [L, K]; each row sums to 1.
        """
        effect = self.factor @ share.ravel()
        return float(self.context_loss + (self.linear * share).sum() + effect @ effect / 2)

    def plan(self, choice: Sequence[int] | NDArray[np.int64]) -> Plan:
        """Return the plan with these menu indices, [L]."""
        return Plan(
            self.layers, tuple(self.fidelities[index] for index in np.asarray(choice).tolist())
        )

    def dumps(self) -> tuple[bytes, bytes]:
        """Return (JSON document, npz archive of the arrays) for `loads` to read."""
        head: dict[str, Any] = {
            "schema": SCHEMA,
            "signal": self.signal,
            "model_sha256": self.model_sha256,
            "calibration_sha256": self.calibration_sha256,
            "fidelities": [fidelity.name for fidelity in self.fidelities],
            "context": self.context,
            "context_loss": self.context_loss,
            "truncation": self.truncation,
            "tokens": self.tokens,
            "layers": [
                {
                    "name": layer.name,
                    "block": layer.block,
                    "kind": layer.kind,
                    "shape": [layer.out_features, layer.in_features],
                }
                for layer in self.layers
            ],
        }
        if self.unquantized is not None:
            head["unquantized"] = self.unquantized.to_json()
        arrays = io.BytesIO()
        np.savez(arrays, linear=self.linear, factor=self.factor)
        return (json.dumps(head, indent=1) + "\n").encode(), arrays.getvalue()

    @classmethod
    def loads(cls, head: bytes, arrays: bytes) -> "Profile":
        """Return the profile from the two documents that `dumps` returns.

        Raises:
            ProfileError: the documents are damaged or have another schema.
        """
        try:
            values: dict[str, Any] = json.loads(head)
            if values["schema"] != SCHEMA:
                raise ProfileError(
                    f"profile schema {values['schema']!r}; this version reads {SCHEMA!r}"
                )
            with np.load(io.BytesIO(arrays), allow_pickle=False) as stored:
                linear, factor = stored["linear"], stored["factor"]
            rest = values.get("unquantized")
            return cls(
                signal=values["signal"],
                layers=tuple(
                    LayerSpec(row["name"], row["block"], row["kind"], *row["shape"])
                    for row in values["layers"]
                ),
                fidelities=tuple(Fidelity.parse(name) for name in values["fidelities"]),
                context=values["context"],
                context_loss=values["context_loss"],
                linear=linear,
                factor=factor,
                truncation=values["truncation"],
                tokens=values["tokens"],
                model_sha256=values["model_sha256"],
                calibration_sha256=values["calibration_sha256"],
                unquantized=None if rest is None else Unquantized.from_json(rest),
            )
        except _UNREADABLE as err:
            raise ProfileError(f"the profile cannot be read: {err}") from err


def profile_digest(head: bytes, arrays: bytes) -> str:
    """Return the digest of the two documents of a profile, as the REST API publishes it.

    SHA-256 of the JSON document's length (8 bytes, big-endian), the document, and the arrays.
    """
    return hashlib.sha256(len(head).to_bytes(8) + head + arrays).hexdigest()


def layer_sizes(layers: Sequence[LayerSpec], fidelities: Sequence[Fidelity]) -> NDArray[np.int64]:
    """Return the exact bytes of each layer at each fidelity, [L, K]."""
    return np.array(
        [
            [
                fidelity.weight_bytes(layer.out_features, layer.in_features)
                for fidelity in fidelities
            ]
            for layer in layers
        ],
        dtype=np.int64,
    )


def shares_of(profile: Profile, plan: Plan) -> Array:
    """Return a plan as shares of the menu's fidelities, [L, K].

    A fidelity that is not on the menu becomes a mix of the two fidelities next to it by bytes, with
    the same bytes.
    """
    sizes = profile.weight_bytes
    share = np.zeros(profile.linear.shape)
    menu = {fidelity: at for at, fidelity in enumerate(profile.fidelities)}
    for row, (size, fidelity) in enumerate(zip(plan.layer_bytes, plan.fidelities, strict=True)):
        if fidelity in menu:
            share[row, menu[fidelity]] = 1
            continue
        order = np.argsort(sizes[row], kind="stable")
        above = int(np.searchsorted(sizes[row][order], size).clip(1, len(order) - 1))
        low = int(order[above - 1])
        high = int(order[above])
        span = int(sizes[row, high] - sizes[row, low])
        part = float(np.clip((size - int(sizes[row, low])) / span, 0, 1)) if span else 1.0
        share[row, low] += 1 - part
        share[row, high] += part
    return share
