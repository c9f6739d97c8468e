"""What a plan costs and which constraints it breaks, such as one that a person edited."""

from dataclasses import dataclass
from typing import Any

from allocator.answers.difference import loss_of, reordered
from allocator.answers.whatif import WhatIf
from allocator.demands.rules import apply_rules
from quantizer.plans.plan import Plan

_SHOWN_LAYERS = 4
"""Layers of a broken tie that a message names."""


@dataclass(frozen=True, slots=True)
class Pricing:
    """What a plan costs and which constraints it breaks.

    Attributes:
        weight_bytes: its exact size.
        bits_per_weight: the same for each weight.
        predicted_loss: modelled KL divergence, [nats/token].
        off_menu: layers whose fidelity the profile did not measure; their effect is interpolated.
        broken_ties: groups of layers that must share a fidelity and do not, as sentences.
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
    """Return what a plan costs and which constraints it breaks.

    Args:
        whatif: profile and constraints.
        plan: of the profile's model.
        budget_bytes: that the plan should fit.

    Raises:
        ProfileError: it is a plan for other layers.
        RuleError: the latency table has no row for a fidelity of the plan.
    """
    profile = whatif.profile
    loss = loss_of(profile, plan)
    plan = reordered(plan, profile.layers)
    menu = set(profile.fidelities)
    off_menu = tuple(
        layer.name
        for layer, fidelity in zip(plan.layers, plan.fidelities, strict=True)
        if fidelity not in menu
    )
    return Pricing(
        weight_bytes=plan.weight_bytes,
        bits_per_weight=plan.bits_per_weight,
        predicted_loss=loss,
        off_menu=off_menu,
        broken_ties=_broken_ties(whatif, plan),
        broken_rules=_broken_rules(whatif, plan),
        broken_limits=_broken_limits(whatif, plan, budget_bytes),
    )


def _broken_ties(whatif: WhatIf, plan: Plan) -> tuple[str, ...]:
    target = whatif.constraints.target
    reason = "" if target == "transformers" else f" for {target}"
    found = []
    for group in whatif.program.members:
        names = sorted({plan.fidelities[at].name for at in group})
        if len(names) > 1:
            shown = [plan.layers[at].name for at in group[:_SHOWN_LAYERS]]
            members = ", ".join([*shown, "..."] if len(group) > _SHOWN_LAYERS else shown)
            found.append(f"{members} must agree{reason}; they have {', '.join(names)}")
    return tuple(found)


def _broken_rules(whatif: WhatIf, plan: Plan) -> tuple[str, ...]:
    rules = whatif.constraints.rules
    groups = whatif.program.members
    # a rule may admit a fidelity that is not on the profile's menu
    menu = tuple(dict.fromkeys((*whatif.profile.fidelities, *plan.fidelities)))
    removed_by = apply_rules(plan.layers, menu, groups, rules).removed_by
    found = []
    for index, group in enumerate(groups):
        for at in group:
            rule = int(removed_by[index, menu.index(plan.fidelities[at])])
            if rule >= 0:
                found.append(
                    f"{plan.layers[at].name} has {plan.fidelities[at].name}, against the rule "
                    f"{str(rules[rule])!r}"
                )
    distinct = len(set(plan.fidelities))
    most = whatif.constraints.most_distinct
    if most is not None and distinct > most:
        found.append(f"{distinct} distinct fidelities; at most {most} were asked for")
    return tuple(found)


def _broken_limits(whatif: WhatIf, plan: Plan, budget_bytes: int | None) -> tuple[str, ...]:
    found = []
    if budget_bytes is not None and plan.weight_bytes > budget_bytes:
        found.append(f"budget of {budget_bytes} bytes: the plan has {plan.weight_bytes}")
    found += [
        f"limit {use.name!r} of {use.most:.10g} {use.unit}: the plan uses {use.used:.10g}"
        for use in whatif.constraints.usage(plan)
        if use.exceeded
    ]
    return tuple(found)
