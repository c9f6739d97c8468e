"""Rules on single layers: fix a fidelity, forbid some, or bound the bits.

Rules are read in order, and the last one wins.

    *.down_proj=int4g64s6      the fidelity of these layers; a pattern such as int4* leaves a choice
    model.layers.0.*!=int2*    what these layers must not have
    *.self_attn.*>=3           least average code bits, without scales; <= is the most

Each rule narrows what the rules before it left. Where nothing would be left, it replaces them. A
rule that matches one of several tied layers holds for all of them.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import isfinite, nan

import numpy as np
from numpy.typing import NDArray

from allocator.demands.ties import matching_layers
from allocator.errors import RuleError
from quantizer.plans.fidelity import Fidelity
from quantizer.plans.plan import LayerSpec

_RULE = re.compile(
    r"\s*(?P<pattern>(?:\[[^\]\s]*\]|[^=!<>\s\[])+)\s*(?P<relation>!=|>=|<=|=)"
    r"\s*(?P<value>[^=!<>\s]+)\s*"
)

_SAME_BITS = 1e-6
"""Average code bits that differ by less count as equal."""

_ALLOWED = -1
"""Stands in `AllowedFidelities.removed_by` where no rule removed the fidelity."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule.

    Attributes:
        pattern: which layers, in shell style.
        relation: `=`, `!=`, `>=` or `<=`.
        value: a pattern of fidelity names, or a number of bits.
    """

    pattern: str
    relation: str
    value: str

    @classmethod
    def parse(cls, text: str) -> "Rule":
        """Return the rule written as `text`, see the module.

        Raises:
            RuleError: it has another form.
        """
        match = _RULE.fullmatch(text)
        if match is None:
            raise RuleError(
                f"rule {text!r}: write PATTERN=FIDELITY, PATTERN!=FIDELITY, PATTERN>=BITS or "
                "PATTERN<=BITS"
            )
        rule = cls(match["pattern"], match["relation"], match["value"])
        if rule.relation in (">=", "<="):
            try:
                bits = float(rule.value)
            except ValueError:
                bits = nan
            if not isfinite(bits):
                raise RuleError(f"rule {text!r}: {rule.value!r} is not a number of bits")
        return rule

    def __str__(self) -> str:
        """Return the text that `parse` reads back."""
        return f"{self.pattern}{self.relation}{self.value}"

    def admits(self, fidelity: Fidelity) -> bool:
        """Return whether the rule lets a layer that it matches have this fidelity."""
        if self.relation == "=":
            return fnmatchcase(fidelity.name, self.value)
        if self.relation == "!=":
            return not fnmatchcase(fidelity.name, self.value)
        above = code_bits(fidelity) - float(self.value)
        return above >= -_SAME_BITS if self.relation == ">=" else above <= _SAME_BITS


@dataclass(frozen=True, slots=True)
class AllowedFidelities:
    """The fidelities that rules leave to each of G groups of tied layers, of a menu of K.

    Attributes:
        allowed: bool [G, K], at least one in each row.
        decided_by: the last rule that narrowed or replaced the choice of a group, or None, [G].
        removed_by: index of the rule that removed a fidelity from a group; -1 where it is allowed,
            int64 [G, K].
    """

    allowed: NDArray[np.bool_]
    decided_by: tuple[Rule | None, ...]
    removed_by: NDArray[np.int64]


def code_bits(fidelity: Fidelity) -> float:
    """Return the average width of a fidelity's codes, without scales and zero points."""
    return fidelity.bits_lo + fidelity.ratio * (fidelity.bits_hi - fidelity.bits_lo)


def apply_rules(
    layers: Sequence[LayerSpec],
    fidelities: Sequence[Fidelity],
    groups: Sequence[Sequence[int]],
    rules: Sequence[Rule],
) -> AllowedFidelities:
    """Return the fidelities that rules, applied in order, leave to each group.

    Args:
        layers: all layers.
        fidelities: the menu.
        groups: indices of layers that share a fidelity, see `group_layers`.
        rules: in order.

    Raises:
        RuleError: a rule matches no layer, or admits no fidelity of the menu.
    """
    allowed = np.ones((len(groups), len(fidelities)), dtype=np.bool_)
    decided_by: list[Rule | None] = [None] * len(groups)
    removed_by = np.full(allowed.shape, _ALLOWED, dtype=np.int64)
    group_of = {at: index for index, group in enumerate(groups) for at in group}
    for index, rule in enumerate(rules):
        matched = matching_layers(layers, rule.pattern)
        admitted = np.array([rule.admits(fidelity) for fidelity in fidelities])
        if not admitted.any():
            menu = ", ".join(fidelity.name for fidelity in fidelities)
            raise RuleError(
                f"rule {str(rule)!r} leaves no fidelity of the menu: {menu}; the menu follows the "
                "budget that the model is profiled for: change the rule, or profile for another "
                "budget"
            )
        for group in sorted({group_of[at] for at in matched}):
            both = allowed[group] & admitted
            left = both if both.any() else admitted
            if (left != allowed[group]).any():
                removed_by[group, allowed[group] & ~left] = index
                removed_by[group, left] = _ALLOWED
                allowed[group] = left
                decided_by[group] = rule
    return AllowedFidelities(allowed, tuple(decided_by), removed_by)
