"""How two plans of the same model differ, and what a plan that a person edited costs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from allocator.answers.whatif import WhatIf
from allocator.demands.rules import decide
from allocator.errors import ProfileError
from allocator.profile import Profile, shares_of
from quantizer.plans.plan import LayerSpec, Plan

_SHOWN_LAYERS = 4
"""Layers of a broken tie that a message names."""


@dataclass(frozen=True, slots=True)
class Change:
    """One layer that two plans store differently."""

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
        loss_before: modelled loss of the first, where a profile was given.
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

    With a profile, what that does to the modelled loss too.

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
        Change(layer.name, one.name, two.name, much - less)
        for layer, one, two, less, much in rows
        if one != two
    )
    losses = (
        (loss_of(profile, before), loss_of(profile, after)) if profile is not None else (None, None)
    )
    return Difference(changes, len(before.layers), before.weight_bytes, after.weight_bytes, *losses)


def loss_of(profile: Profile, plan: Plan) -> float:
    """Return the modelled loss of any plan of the profile's model.

    Fidelities off its menu are interpolated by their bytes.

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


@dataclass(frozen=True, slots=True)
class Pricing:
    """What a plan costs and what it breaks.

    Attributes:
        weight_bytes: its exact size.
        bits_per_weight: the same for each weight.
        predicted_loss: modelled KL divergence, [nats/token].
        off_menu: layers whose fidelity the profile did not measure; their effect is interpolated.
        broken_ties: groups of layers that the target needs to agree and that do not, as sentences.
        broken_rules: rules that a layer breaks, as sentences.
        broken_limits: limits that are exceeded, the budget among them, as sentences.
    """

    weight_bytes: int
    bits_per_weight: float
    predicted_loss: float
    off_menu: tuple[str, ...]
    broken_ties: tuple[str, ...]
    broken_rules: tuple[str, ...]
    broken_limits: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Whether nothing is broken."""
        return not (self.broken_ties or self.broken_rules or self.broken_limits)

    def to_json(self) -> dict[str, Any]:
        """Return the pricing as JSON values."""
        return {
            "weight_bytes": self.weight_bytes,
            "bits_per_weight": self.bits_per_weight,
            "predicted_loss_nats_per_token": self.predicted_loss,
            "sound": self.sound,
            "off_menu": list(self.off_menu),
            "broken_ties": list(self.broken_ties),
            "broken_rules": list(self.broken_rules),
            "broken_limits": list(self.broken_limits),
        }


def price_plan(whatif: WhatIf, plan: Plan, budget_bytes: int | None = None) -> Pricing:
    """Return what a plan, such as one that a person edited, costs and breaks under the constraints of `whatif`.

    Raises:
        ProfileError: it is a plan for other layers.
        RuleError: the latency table does not know a fidelity of the plan.
    """
    profile = whatif.profile
    loss = loss_of(profile, plan)
    plan = reordered(plan, profile.layers)
    menu = set(profile.fidelities)
    off = tuple(
        layer.name
        for layer, fidelity in zip(plan.layers, plan.fidelities, strict=True)
        if fidelity not in menu
    )
    return Pricing(
        plan.weight_bytes, plan.bits_per_weight, loss, off,
        _broken_ties(whatif, plan), _broken_rules(whatif, plan), _broken_limits(whatif, plan, budget_bytes),
    )  # fmt: skip


def _broken_ties(whatif: WhatIf, plan: Plan) -> tuple[str, ...]:
    found = []
    for group in whatif.program.members:
        names = sorted({plan.fidelities[at].name for at in group})
        if len(names) > 1:
            shown = [plan.layers[at].name for at in group[:_SHOWN_LAYERS]]
            members = ", ".join([*shown, "..."] if len(group) > _SHOWN_LAYERS else shown)
            found.append(f"{members} must agree{_for_target(whatif)}; they have {', '.join(names)}")
    return tuple(found)


def _for_target(whatif: WhatIf) -> str:
    return (
        "" if whatif.constraints.target == "transformers" else f" for {whatif.constraints.target}"
    )


def _broken_rules(whatif: WhatIf, plan: Plan) -> tuple[str, ...]:
    rules, groups, found = whatif.constraints.rules, whatif.program.members, []
    menu = tuple(
        dict.fromkeys((*whatif.profile.fidelities, *plan.fidelities))
    )  # a rule may admit what is off the menu
    decision = decide(plan.layers, menu, groups, rules)
    for index, group in enumerate(groups):
        for at in group:
            rule = int(decision.removed_by[index, menu.index(plan.fidelities[at])])
            if rule >= 0:
                found.append(
                    f"{plan.layers[at].name} has {plan.fidelities[at].name}, against the rule "
                    f"{str(rules[rule])!r}"
                )
    distinct, most = len(set(plan.fidelities)), whatif.constraints.most_distinct
    if most is not None and distinct > most:
        found.append(f"{distinct} distinct fidelities; at most {most} were asked for")
    return tuple(found)


def _broken_limits(whatif: WhatIf, plan: Plan, budget_bytes: int | None) -> tuple[str, ...]:
    found = []
    if budget_bytes is not None and plan.weight_bytes > budget_bytes:
        found.append(f"budget of {budget_bytes} bytes: the plan has {plan.weight_bytes}")
    for name, unit, used, most in whatif.constraints.uses_of(plan):
        if used > most * (1 + 1e-12):
            found.append(f"limit {name!r} of {most:.10g} {unit}: the plan uses {used:.10g}")
    return tuple(found)
