"""The ways to tell what each layer costs at each fidelity, by name."""

from collections.abc import Mapping

from allocator.errors import SignalUnknown
from allocator.profiling.gradient import gradient
from allocator.profiling.hessian import hessian
from allocator.profiling.integral import integral
from allocator.profiling.noise import noise
from allocator.profiling.output import output
from allocator.profiling.signal import Signal

SIGNALS: Mapping[str, Signal] = {
    "integral": integral,
    "output": output,
    "gradient": gradient,
    "noise": noise,
    "hessian": hessian,
}
"""The first is the default; README and tests/benchmarks/LOG.md have how they compare."""


def find_signal(name: str) -> Signal:
    """Return the signal called `name`.

    Raises:
        SignalUnknown: there is none.
    """
    if name not in SIGNALS:
        raise SignalUnknown(f"signal {name!r} does not exist; use one of {', '.join(SIGNALS)}")
    return SIGNALS[name]
