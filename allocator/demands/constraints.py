"""Everything that a plan must respect besides its budget, as a user states it."""

import csv
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import inf, nan
from typing import Any, TextIO

from allocator.demands.budget import Budget
from allocator.demands.rules import Rule
from allocator.demands.ties import matching_layers
from allocator.errors import RuleError
from quantizer.plans.fidelity import Fidelity
from quantizer.plans.plan import LayerSpec, Plan

ROUNDING = 1e-12
"""Relative excess over a limit that counts as a rounding error of the sum, not as a violation."""

_COLUMNS = ("layer", "fidelity", "latency_us")


@dataclass(frozen=True, slots=True)
class Pool:
    """A memory of limited size that holds some of the layers, such as one of several devices.

    Attributes:
        name: what it is called.
        pattern: which layers it holds, in shell style.
        most_bytes: bytes of these layers that it can hold.
    """

    name: str
    pattern: str
    most_bytes: int

    @classmethod
    def parse(cls, text: str) -> "Pool":
        """Return the pool written as NAME:PATTERN=SIZE, such as `gpu0:model.layers.[0-9].*=40MB`.

        Raises:
            RuleError: it has another form, or its size is below a byte or in bits per weight.
            BudgetError: the size cannot be understood.
        """
        name, colon, rest = text.partition(":")
        pattern, equals, size = rest.rpartition("=")
        if not (name.strip() and colon and pattern.strip() and equals):
            raise RuleError(
                f"pool {text!r}: write NAME:PATTERN=SIZE, such as 'gpu0:model.layers.[0-9].*=40MB'"
            )
        budget = Budget.parse(size)
        if budget.per_weight:
            raise RuleError(f"pool {text!r}: give its size in bytes, such as 40MB")
        most_bytes = budget.weight_bytes(())
        if most_bytes < 1:
            raise RuleError(f"pool {text!r} is smaller than a byte; give a size such as 40MB")
        return cls(name.strip(), pattern.strip(), most_bytes)


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """Measured times of layers.

    Attributes:
        rows: (pattern of layer names, fidelity name, microseconds); of several rows that match a
            layer the last one counts.
    """

    rows: tuple[tuple[str, str, float], ...]

    @classmethod
    def read(cls, file: TextIO) -> "LatencyTable":
        """Return the table in a CSV file with the columns layer, fidelity and latency_us.

        Raises:
            RuleError: a column is missing, or a time is not a number of at least 0.
        """
        rows = []
        number = 1
        try:
            lines = csv.reader(file)
            names = [name.strip().lstrip("\ufeff") for name in next(lines, [])]
            places = [names.index(name) for name in _COLUMNS]
            for number, line in enumerate(lines, start=2):
                if line:
                    cells = [line[place].strip() for place in places]
                    rows.append((cells[0], cells[1], _microseconds(cells[2], number)))
        except (ValueError, IndexError, csv.Error) as err:
            raise RuleError(
                f"latency table, line {number}: columns layer, fidelity and latency_us are needed "
                f"({err})"
            ) from err
        return cls(tuple(rows))

    def latency_us(self, layer: LayerSpec, fidelity: Fidelity) -> float:
        """Return the time of a layer at a fidelity, in microseconds.

        Raises:
            RuleError: the table has no row for them.
        """
        times = [
            time
            for pattern, name, time in self.rows
            if name == fidelity.name and fnmatchcase(layer.name, pattern)
        ]
        if not times:
            raise RuleError(
                f"the latency table has no row for layer {layer.name!r} at {fidelity.name}"
            )
        return times[-1]


@dataclass(frozen=True, slots=True)
class Usage:
    """How much of a limit a plan uses.

    Attributes:
        name: of the limit.
        unit: of the amounts, `bytes` or `us`.
        used: by the plan.
        most: the limit.
    """

    name: str
    unit: str
    used: float
    most: float

    @property
    def exceeded(self) -> bool:
        """Whether the plan uses more than the limit allows."""
        return self.used > self.most * (1 + ROUNDING)


@dataclass(frozen=True, slots=True)
class Constraints:
    """What a plan must respect besides its budget.

    Attributes:
        target: the inference engine that will serve the model, see `allocator.demands.ties`.
        ties: further layers that share a fidelity, see `allocator.demands.ties.group_layers`.
        untied: patterns of layers that are not tied.
        rules: rules on single layers, in order.
        pools: memories with limits of their own.
        latency: times of layers, where latency is limited.
        most_latency_us: the limit of the sum of these times.
        most_distinct: how many different fidelities a plan may use.

    Raises:
        RuleError: fields do not go together.
    """

    target: str = "transformers"
    ties: tuple[str, ...] = ()
    untied: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    pools: tuple[Pool, ...] = ()
    latency: LatencyTable | None = None
    most_latency_us: float | None = None
    most_distinct: int | None = None

    def __post_init__(self) -> None:
        """Refuse what no plan could respect."""
        if (self.latency is None) != (self.most_latency_us is None):
            raise RuleError("a latency limit needs both a table of times and the most microseconds")
        if self.most_latency_us is not None and not 0 < self.most_latency_us < inf:
            raise RuleError(
                f"latency limit {self.most_latency_us}: give a positive number of microseconds"
            )
        if self.most_distinct is not None and self.most_distinct < 1:
            raise RuleError(f"at most {self.most_distinct} distinct fidelities: give 1 or more")
        names = [pool.name for pool in self.pools]
        if len(set(names)) != len(names):
            raise RuleError(f"pools {', '.join(names)}: each needs a name of its own")

    def to_json(self) -> dict[str, Any]:
        """Return the constraints as JSON values, as a user states them.

        Of the latency table, only the limit is included.
        """
        return {
            "target": self.target,
            "ties": list(self.ties),
            "untied": list(self.untied),
            "rules": [str(rule) for rule in self.rules],
            "pools": {
                pool.name: {"pattern": pool.pattern, "most_bytes": pool.most_bytes}
                for pool in self.pools
            },
            "most_latency_us": self.most_latency_us,
            "most_distinct": self.most_distinct,
        }

    def usage(self, plan: Plan) -> list[Usage]:
        """Return how much of each pool, and of the latency limit, any plan uses.

        Raises:
            RuleError: the latency table has no row for a fidelity of the plan.
        """
        sizes = plan.layer_bytes
        found = []
        for pool in self.pools:
            used_bytes = sum(sizes[at] for at in matching_layers(plan.layers, pool.pattern))
            found.append(Usage(pool.name, "bytes", float(used_bytes), float(pool.most_bytes)))
        if self.latency is not None and self.most_latency_us is not None:
            times = [
                self.latency.latency_us(layer, fidelity)
                for layer, fidelity in zip(plan.layers, plan.fidelities, strict=True)
            ]
            found.append(Usage("latency", "us", float(sum(times)), self.most_latency_us))
        return found


def _microseconds(text: str, line: int) -> float:
    try:
        time = float(text)
    except ValueError:
        time = nan
    if not 0 <= time < inf:
        raise RuleError(f"latency table, line {line}: {text[:40]!r} is not a time in microseconds")
    return time


UNCONSTRAINED = Constraints()
"""Nothing but the budget."""
