"""The function that measures each signal."""

from collections.abc import Callable, Mapping

from allocator.profiling.context import ProfilingContext
from allocator.profiling.gradient import measure_gradient
from allocator.profiling.hessian import measure_hessian
from allocator.profiling.integral import measure_integral
from allocator.profiling.loss_model import LossModel
from allocator.profiling.noise import measure_noise
from allocator.profiling.output import measure_output
from allocator.signals import GRADIENT, HESSIAN, INTEGRAL, NOISE, OUTPUT, Signal

Measure = Callable[[ProfilingContext], LossModel]
"""Measures a signal. Continues from what `parts` of the context holds of an interrupted run."""

MEASURES: Mapping[Signal, Measure] = {
    INTEGRAL: measure_integral,
    OUTPUT: measure_output,
    GRADIENT: measure_gradient,
    NOISE: measure_noise,
    HESSIAN: measure_hessian,
}
"""One function for each signal of `allocator.signals`."""
