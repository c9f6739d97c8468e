"""The parts of a report about the plan: how each layer, embedding and head is stored."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """A quantized layer.

    Attributes:
        fidelity: how it is stored.
        block: index of its decoder block.
        kind: its path inside the block.
        shape: rows and columns of its weight.
        weight_bytes: its size.
    """

    fidelity: str
    block: int
    kind: str
    shape: tuple[int, int]
    weight_bytes: int

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True, slots=True)
class LimitInfo:
    """Use of a limit other than the budget.

    Attributes:
        name: which limit.
        unit: of `used` and `most`.
        used: by the plan.
        most: what is allowed.
        price_nats_per_token: loss that one more unit would save [nats/token/unit].
    """

    name: str
    unit: str
    used: float
    most: float
    price_nats_per_token: float


@dataclass(frozen=True, slots=True)
class PlanInfo:
    """The delivered plan and the solver's proof, see `allocator.answers.allocation.Allocation`.

    Attributes:
        schema: of the plan's document.
        weight_bytes: its exact size.
        bits_per_weight: its average size.
        layers: layers by name.
        budget_bytes: the budget.
        slack_bytes: bytes of the budget that are not used.
        predicted_loss_nats_per_token: modelled KL divergence on calibration text [nats/token].
        bound_nats_per_token: modelled loss that no plan of this budget can be below [nats/token].
        gap: share of the loss above the bound.
        price_nats_per_token_per_byte: modelled loss that one more byte would save.
        limits: use of further limits.
        decided_by: the rule that decided a layer, by name of the layer.
        status: `solved` or `inaccurate`.
        solver: which one.
        bitwright: version of the package.
        notes: remarks of the solver.
    """

    schema: str
    weight_bytes: int
    bits_per_weight: float
    layers: Mapping[str, LayerInfo]
    budget_bytes: int
    slack_bytes: int
    predicted_loss_nats_per_token: float
    bound_nats_per_token: float
    gap: float
    price_nats_per_token_per_byte: float
    limits: tuple[LimitInfo, ...]
    decided_by: Mapping[str, str]
    status: str
    solver: str
    bitwright: str
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TableInfo:
    """An embedding or head that is quantized.

    Attributes:
        kind: `embedding`, `head`, or `embedding and head`.
        fidelity: how it is stored.
        weight_bytes: its size.
    """

    kind: str
    fidelity: str
    weight_bytes: int
