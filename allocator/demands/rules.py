"""What a user demands of single layers: pins, what is forbidden, and floors.

Read in order; the last rule wins.

    *.down_proj=int4g64s6        the fidelity of these layers; a pattern such as int4* leaves a choice
    model.layers.0.*!=int2*     what these layers must not have
    *.self_attn.*>=3            average code bits at least, scales not counted; <= is at most

Each rule narrows what the rules before it left. Where nothing would be left, it replaces them. A
rule that names one of several tied layers holds for all of them.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import isfinite, nan

import numpy as np
from numpy.typing import NDArray

from allocator.demands.ties import matching
from allocator.errors import RuleError
from quantizer.plans.fidelity import Fidelity
from quantizer.plans.plan import LayerSpec

_RULE = re.compile(
    r"\s*(?P<pattern>(?:\[[^\]\s]*\]|[^=!<>\s\[])+)\s*(?P<relation>!=|>=|<=|=)\s*(?P<value>[^=!<>\s]+)\s*"
)


_SAME_BITS = 1e-6
_NONE = -1


@dataclass(frozen=True, slots=True)
class Rule:
    """One demand.

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
        """Return whether the rule lets a layer that it names have this fidelity."""
        if self.relation == "=":
            return fnmatchcase(fidelity.name, self.value)
        if self.relation == "!=":
            return not fnmatchcase(fidelity.name, self.value)
        above = code_bits(fidelity) - float(self.value)
        return above >= -_SAME_BITS if self.relation == ">=" else above <= _SAME_BITS


@dataclass(frozen=True, slots=True)
class Decision:
    """What rules leave to each group.

    Attributes:
        allowed: bool [G, K], at least one in each row.
        decided_by: the last rule that narrowed or replaced a group's choice, or None, [G].
        removed_by: index of the rule that took a fidelity away from a group; -1 where it is
            allowed, int64 [G, K].
    """

    allowed: NDArray[np.bool_]
    decided_by: tuple[Rule | None, ...]
    removed_by: NDArray[np.int64]


def code_bits(fidelity: Fidelity) -> float:
    """Return the average width of a fidelity's codes, scales and zero points not counted."""
    return fidelity.bits_lo + fidelity.ratio * (fidelity.bits_hi - fidelity.bits_lo)


def decide(
    layers: Sequence[LayerSpec],
    fidelities: Sequence[Fidelity],
    groups: Sequence[Sequence[int]],
    rules: Sequence[Rule],
) -> Decision:
    """Apply rules in order.

    Raises:
        RuleError: a rule names no layer, or admits no fidelity of the menu.
    """
    allowed = np.ones((len(groups), len(fidelities)), dtype=np.bool_)
    decided_by: list[Rule | None] = [None] * len(groups)
    removed_by = np.full(allowed.shape, _NONE, dtype=np.int64)
    group_of = {at: index for index, group in enumerate(groups) for at in group}
    for index, rule in enumerate(rules):
        admitted = np.array([rule.admits(fidelity) for fidelity in fidelities])
        if not admitted.any():
            menu = ", ".join(fidelity.name for fidelity in fidelities)
            raise RuleError(f"rule {str(rule)!r} leaves no fidelity of the menu: {menu}")
        for group in sorted({group_of[at] for at in matching(layers, rule.pattern)}):
            both = allowed[group] & admitted
            left = both if both.any() else admitted
            if (left != allowed[group]).any():
                removed_by[group, allowed[group] & ~left] = index
                removed_by[group, left] = _NONE
                allowed[group], decided_by[group] = left, rule
    return Decision(allowed, tuple(decided_by), removed_by)
