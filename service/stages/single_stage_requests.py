"""What a user asks of the commands that run a single stage."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quantizer.plans.plan import Plan
from quantizer.texts.text import TextSpec
from service.request.effort import Effort
from service.stages.recipe import Recipe


@dataclass(frozen=True, slots=True)
class QuantizeRequest:
    """What a user asks of `quantize`.

    Attributes:
        model: a folder, a GGUF file, or a Hugging Face id.
        plan: fidelities of layers, embedding and head.
        text: calibration windows that layers are quantized on.
        held_out_windows: further windows of this text, on which the trained checkpoint is compared
            with the untrained one.
        effort: how much work goes into the layers.
        recipe: how they are quantized and trained.
        seed: of everything random.
        device: `cpu`, `cuda`, or `auto`.

    Raises:
        RequestError: the effort leaves nothing of the recipe.
    """

    model: str
    plan: Plan
    text: TextSpec
    held_out_windows: int
    effort: Effort
    recipe: Recipe
    seed: int
    device: str

    def __post_init__(self) -> None:
        """Refuse an effort that leaves nothing of the recipe."""
        self.recipe.check(self.effort)


@dataclass(frozen=True, slots=True)
class EvaluateRequest:
    """What a user asks of `evaluate`.

    Attributes:
        model: a folder, a GGUF file, or a Hugging Face id.
        checkpoints: folders of quantized checkpoints of this model, by name.
        text: windows that they are scored on.
        device: `cpu`, `cuda`, or `auto`.
    """

    model: str
    checkpoints: Mapping[str, Path]
    text: TextSpec
    device: str
