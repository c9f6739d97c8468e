"""Named ways to make the checkpoint of a plan.

The usual one, and the source methods each by itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quantizer.rounding.methods import DEFAULT_ROUNDING, Rounding
from service.errors import RequestError
from service.request.effort import Effort

BLOCKS, MODEL = "blocks", "model"
"""Kinds of training: one block after another, or all of the model end to end."""

SCALES: Mapping[str, Any] = {"trained": "scales", "scale_rate": 3e-2}
CLIPPING: Mapping[str, Any] = {"trained": "clipping", "scale_rate": 1e-3}
"""Changes of `quantizer.training.descent.TrainingSpec` that train scales alone, and ranges.

There codes follow, and turn over in masses
where scales move as far as they may alone."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a checkpoint is made.

    Attributes:
        name: what the user calls it.
        rounding: how codes are found.
        requantized: whether the plan's outliers are the weights that the post-quantization integral
            ranks highest, see `service.stages.requantize`.
        kind: what is trained, one of `BLOCKS` and `MODEL`; None leaves that to the effort and the
            machine.
        changes: fields of `quantizer.training.descent.TrainingSpec` that are not the usual ones.
    """

    name: str
    rounding: Rounding = DEFAULT_ROUNDING
    requantized: bool = False
    kind: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)

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


USUAL = Recipe("usual")
RECIPES = {
    each.name: each
    for each in (
        USUAL,
        Recipe("rtn", Rounding("rtn")),
        Recipe("requant", requantized=True),
        Recipe("blockwise", kind=BLOCKS),
        Recipe("sgr-q", kind=MODEL, changes={**SCALES, "salient": "knee"}),
        Recipe("apiq", kind=BLOCKS, changes=CLIPPING),
        Recipe("signiq", kind=BLOCKS, changes={**CLIPPING, "penalty": 0.1}),
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
