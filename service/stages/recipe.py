"""Named ways to make the checkpoint of a plan: the default one, and single published methods."""

from dataclasses import dataclass, replace

from quantizer.rounding.methods import DEFAULT_ROUNDING, Rounding
from quantizer.training.spec import TrainingSpec
from service.errors import RequestError
from service.request.effort import Effort

BLOCKS, MODEL = "blocks", "model"
"""Kinds of training: one block after another, or all of the model end to end."""


@dataclass(frozen=True, slots=True)
class TrainedParameters:
    """What of the quantized layers is trained, and how fast.

    Attributes:
        trained: one of `quantizer.training.spec.TRAINED`.
        scale_rate: learning rate of scales.
        salient: which groups' scales are trained, one of `quantizer.importance.saliency.RULES`.
        penalty: lambda of the penalty on moving weights that matter, 0 for none.
    """

    trained: str
    scale_rate: float
    salient: str = "all"
    penalty: float = 0.0

    def applied_to(self, spec: TrainingSpec) -> TrainingSpec:
        """Return the specification of a training of these parameters."""
        return replace(
            spec,
            trained=self.trained,
            scale_rate=self.scale_rate,
            salient=self.salient,
            penalty=self.penalty,
        )


CODES = TrainedParameters("codes", scale_rate=1e-2)
"""Codes and scales together."""
SCALES = TrainedParameters("scales", scale_rate=3e-2)
"""Scales alone."""
CLIPPING = TrainedParameters("clipping", scale_rate=1e-3)
"""Scales, with codes that follow: the range in which weights are not clipped.

Many codes change at once when scales move as far as `SCALES` lets them, so the rate is lower.
"""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a checkpoint is made.

    Attributes:
        name: what the user calls it.
        rounding: how codes are found.
        requantized: whether the plan's outliers are the weights that the post-quantization integral
            ranks highest, see `service.stages.requantize`.
        kind: what is trained, `BLOCKS` or `MODEL`; None leaves this, and what of the layers is
            trained, to the effort and the machine.
        parameters: what of the layers is trained, if `kind` is given.
    """

    name: str
    rounding: Rounding = DEFAULT_ROUNDING
    requantized: bool = False
    kind: str | None = None
    parameters: TrainedParameters = CODES

    def check(self, effort: Effort) -> None:
        """Refuse an effort that leaves nothing of the recipe.

        Raises:
            RequestError: the recipe is a way of training, and nothing is trained.
        """
        if self.kind is not None and not effort.steps:
            raise RequestError(
                f"recipe {self.name!r} is a way of training, effort {effort.name!r} trains "
                "nothing: use balanced or best"
            )


DEFAULT_RECIPE = Recipe("usual")
RECIPES = {
    each.name: each
    for each in (
        DEFAULT_RECIPE,
        Recipe("rtn", Rounding("rtn")),
        Recipe("requant", requantized=True),
        Recipe("blockwise", kind=BLOCKS),
        Recipe("sgr-q", kind=MODEL, parameters=replace(SCALES, salient="knee")),
        Recipe("apiq", kind=BLOCKS, parameters=CLIPPING),
        Recipe("signiq", kind=BLOCKS, parameters=replace(CLIPPING, penalty=0.1)),
    )
}


def find_recipe(name: str) -> Recipe:
    """Return the recipe called `name`.

    Raises:
        RequestError: there is none.
    """
    if name not in RECIPES:
        raise RequestError(f"recipe {name!r} does not exist; use one of {', '.join(RECIPES)}")
    return RECIPES[name]
