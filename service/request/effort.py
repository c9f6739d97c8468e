"""Levels of effort: how much work goes into a checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from service.errors import RequestError


@dataclass(frozen=True, slots=True)
class Effort:
    """One level of effort.

    Attributes:
        name: what users call it.
        steps: steps of end-to-end distillation of the delivered plan; 0 for none. See
            `quantizer.training.distill`.
        block_steps: steps per block of block-wise training, which replaces the end-to-end training
            of codes where the whole model does not fit. See `quantizer.training.blockwise`.
        calibration: layers are quantized on this many times the calibration windows, as far as the
            text has them; a profile is measured on the calibration windows themselves.
        rivals: number of uniform plans, of those that may be best, that are quantized and compared
            with the solver's plan.
    """

    name: str
    steps: int
    block_steps: int
    calibration: int
    rivals: int


EffortName = Literal["fast", "balanced", "best"]
FAST, DEFAULT, BEST = get_args(EffortName)

EFFORTS: Mapping[str, Effort] = {
    FAST: Effort(FAST, 0, 0, 1, 1),
    DEFAULT: Effort(DEFAULT, 100, 60, 4, 3),
    BEST: Effort(BEST, 400, 240, 8, 3),
}


def find_effort(name: str) -> Effort:
    """Return the effort called `name`.

    Raises:
        RequestError: there is none.
    """
    if name not in EFFORTS:
        raise RequestError(f"effort {name!r} does not exist; use one of {', '.join(EFFORTS)}")
    return EFFORTS[name]
