"""How much work goes into a result, by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from service.errors import RequestError


@dataclass(frozen=True, slots=True)
class Effort:
    """One level of effort: how layers are quantized, and what follows.

    Attributes:
        name: what the user calls it.
        steps: steps of end-to-end distillation of the plan that is delivered; 0 for none. See
            `quantizer.training.distill`.
        block_steps: steps for each block of block-wise training, which takes the place of training
            codes end to end where the whole model is too large for it. See `quantizer.training.blockwise`.
        calibration: how many times the calibration windows layers are quantized on, of those that
            the text has; a profile does with the calibration windows as they are.
        rivals: how many of the uniform plans that may be best are quantized and compared with the
            solver's plan.
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
