"""All that a plan must respect beside its budget, as a user states it."""

import csv
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import inf, nan
from typing import Any, TextIO

from allocator.demands.budget import Budget
from allocator.demands.rules import Rule
from allocator.demands.ties import matching
from allocator.errors import RuleError
from quantizer.plans.fidelity import Fidelity
from quantizer.plans.plan import LayerSpec, Plan


@dataclass(frozen=True, slots=True)
class Pool:
    """Memory of its own that holds some of the layers, such as one of several devices.

    Attributes:
        name: what it is called.
        pattern: which layers it holds, in shell style.
        most_bytes: how much it holds.
    """

    name: str
    pattern: str
    most_bytes: int

    @classmethod
    def parse(cls, text: str) -> "Pool":
        """Return the pool written as NAME:PATTERN=SIZE, such as `gpu0:model.layers.[0-9].*=40MB`.

        Raises:
            RuleError: it has another form.
            BudgetError: the size is none, or counts bits per weight.
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
        if budget.weight_bytes(()) < 1:
            raise RuleError(f"pool {text!r} holds no byte")
        return cls(name.strip(), pattern.strip(), budget.weight_bytes(()))


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """Measured times of layers.

    Attributes:
        rows: (pattern of layer names, fidelity name, microseconds); of several rows that name a
            layer the last one counts.
    """

    rows: tuple[tuple[str, str, float], ...]

    @classmethod
    def read(cls, file: TextIO) -> "LatencyTable":
        """Return the table in a CSV file with the columns layer, fidelity and latency_us.

        Raises:
            RuleError: a column is missing, or a time is not a number of at least 0.
        """
        rows, number = [], 1
        try:
            lines = csv.reader(file)
            names = [name.strip().lstrip("\ufeff") for name in next(lines, [])]
            places = [names.index(name) for name in ("layer", "fidelity", "latency_us")]
            for number, line in enumerate(lines, start=2):
                if line:
                    layer, fidelity, time = (line[place].strip() for place in places)
                    rows.append((layer, fidelity, _microseconds(time, number)))
        except (ValueError, IndexError, csv.Error) as err:
            raise RuleError(
                f"latency table, line {number}: columns layer, fidelity and latency_us are needed "
                f"({err})"
            ) from err
        return cls(tuple(rows))

    def latency_us(self, layer: LayerSpec, fidelity: Fidelity) -> float:
        """Return the time of a layer at a fidelity, in microseconds.

        Raises:
            RuleError: the table does not say.
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
class Constraints:
    """Demands on a plan.

    Attributes:
        target: the engine that will serve the model, see `allocator.demands.ties`.
        ties: further ties, see `allocator.demands.ties.group_layers`.
        untied: patterns of layers that are not tied.
        rules: demands on single layers, in order.
        pools: memories with limits of their own.
        latency: times of layers, where time is limited.
        most_latency_us: the limit of their sum.
        most_distinct: fidelities that a plan may use at most.

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
        """Return the demands as JSON values, as a user states them.

        Of a table of times its limit only.
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

    def uses_of(self, plan: Plan) -> list[tuple[str, str, float, float]]:
        """Return (name, unit, used, most) of each limit for a plan, whatever its fidelities.

        Raises:
            RuleError: the latency table does not know a fidelity of the plan.
        """
        found: list[tuple[str, str, float, float]] = []
        for pool in self.pools:
            inside = matching(plan.layers, pool.pattern)
            found.append(
                (
                    pool.name,
                    "bytes",
                    float(sum(plan.layer_bytes[at] for at in inside)),
                    float(pool.most_bytes),
                )
            )
        if self.latency is not None and self.most_latency_us is not None:
            times = [
                self.latency.latency_us(layer, fidelity)
                for layer, fidelity in zip(plan.layers, plan.fidelities, strict=True)
            ]
            found.append(("latency", "us", float(sum(times)), self.most_latency_us))
        return found


def _microseconds(text: str, line: int) -> float:
    try:
        time = float(text)
    except ValueError:
        time = nan
    if not 0 <= time < inf:
        raise RuleError(f"latency table, line {line}: {text[:40]!r} is not a time in microseconds")
    return time


FREE = Constraints()
"""No demands beside the budget."""
