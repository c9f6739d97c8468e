"""How two plans of the same model differ."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from allocator.errors import ProfileError
from allocator.profile import Profile, shares_of
from quantizer.plans.plan import LayerSpec, Plan


@dataclass(frozen=True, slots=True)
class Change:
    """One layer that two plans store differently.

    Attributes:
        layer: its name.
        before: fidelity in the first plan.
        after: fidelity in the second.
        bytes_more: how much larger the second is; negative where it is smaller.
    """

    layer: str
    before: str
    after: str
    bytes_more: int


@dataclass(frozen=True, slots=True)
class Difference:
    """What changes from one plan to another.

    Attributes:
        changes: layers that differ, in order.
        layers: how many layers there are.
        bytes_before: size of the first plan.
        bytes_after: size of the second.
        loss_before: modelled loss of the first, [nats/token], where a profile was given.
        loss_after: modelled loss of the second.
    """

    changes: tuple[Change, ...]
    layers: int
    bytes_before: int
    bytes_after: int
    loss_before: float | None = None
    loss_after: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the difference as JSON values."""
        found: dict[str, Any] = {
            "layers": self.layers,
            "changed": len(self.changes),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "bytes_more": self.bytes_after - self.bytes_before,
        }
        if self.loss_before is not None and self.loss_after is not None:
            found |= {
                "predicted_loss_before": self.loss_before,
                "predicted_loss_after": self.loss_after,
                "predicted_loss_more": self.loss_after - self.loss_before,
            }
        return found | {
            "changes": [
                {
                    "layer": change.layer,
                    "before": change.before,
                    "after": change.after,
                    "bytes_more": change.bytes_more,
                }
                for change in self.changes
            ]
        }


def compare_plans(before: Plan, after: Plan, profile: Profile | None = None) -> Difference:
    """Return what changes from one plan of a model to another.

    Args:
        before: the first plan.
        after: the second.
        profile: predicts the losses of both.

    Raises:
        ProfileError: the plans, or the profile, are of models with other layers.
    """
    check_layers("the two plans", before.layers, after.layers)
    after = reordered(after, before.layers)
    rows = zip(
        before.layers,
        before.fidelities,
        after.fidelities,
        before.layer_bytes,
        after.layer_bytes,
        strict=True,
    )
    changes = tuple(
        Change(layer.name, one.name, two.name, two_bytes - one_bytes)
        for layer, one, two, one_bytes, two_bytes in rows
        if one != two
    )
    return Difference(
        changes=changes,
        layers=len(before.layers),
        bytes_before=before.weight_bytes,
        bytes_after=after.weight_bytes,
        loss_before=None if profile is None else loss_of(profile, before),
        loss_after=None if profile is None else loss_of(profile, after),
    )


def loss_of(profile: Profile, plan: Plan) -> float:
    """Return the modelled loss of any plan of the profile's model, [nats/token].

    Fidelities that the profile did not measure are interpolated by their bytes.

    Raises:
        ProfileError: it is a plan for other layers.
    """
    check_layers("plan and profile", profile.layers, plan.layers)
    return profile.loss_of_shares(shares_of(profile, reordered(plan, profile.layers)))


def reordered(plan: Plan, layers: Sequence[LayerSpec]) -> Plan:
    """Return the plan with its layers in another order."""
    chosen = plan.by_name
    return Plan(tuple(layers), tuple(chosen[layer.name] for layer in layers))


def check_layers(what: str, one: Sequence[LayerSpec], two: Sequence[LayerSpec]) -> None:
    """Refuse layers that are not the same.

    Raises:
        ProfileError: names one that differs.
    """
    here, there = ({layer.name: layer for layer in layers} for layers in (one, two))
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            raise ProfileError(
                f"{what} are of different models: layer {name!r} is not the same in both"
            )
