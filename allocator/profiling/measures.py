"""The function that measures each signal."""

from collections.abc import Mapping

from allocator.profiling.gradient import gradient
from allocator.profiling.hessian import hessian
from allocator.profiling.integral import integral
from allocator.profiling.noise import noise
from allocator.profiling.output import output
from allocator.profiling.signal import Measure
from allocator.signals import GRADIENT, HESSIAN, INTEGRAL, NOISE, OUTPUT, Signal

MEASURES: Mapping[Signal, Measure] = {
    INTEGRAL: integral,
    OUTPUT: output,
    GRADIENT: gradient,
    NOISE: noise,
    HESSIAN: hessian,
}
"""One function for each signal of `allocator.signals`."""
