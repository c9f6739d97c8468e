"""The checkpoint that a run delivers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from service.stages.selection import Selection
from service.stages.training import TrainingResult


@dataclass(frozen=True, slots=True)
class Delivery:
    """The selected candidate, before and after training.

    Attributes:
        source: folder of the original model, whose side files are delivered, too.
        selection: which candidate plan is delivered.
        checkpoints: folders of all candidates, by name of their plan.
        training: the trained checkpoint; None if nothing was trained.
    """

    source: Path
    selection: Selection
    checkpoints: Mapping[str, Path]
    training: TrainingResult | None

    @property
    def is_trained(self) -> bool:
        """Whether the trained checkpoint is delivered, as it is nearer to the original."""
        return self.training is not None and self.training.is_nearer

    @property
    def checkpoint(self) -> Path:
        """Folder of the checkpoint that is delivered."""
        if self.training is not None:
            return self.training.nearer
        return self.checkpoints[self.selection.delivered]

    @property
    def evaluated(self) -> dict[str, Path]:
        """Folders of the checkpoints that are scored on the evaluation text, by name.

        `plan` is delivered, `uniform` is the best uniform plan, and `untuned` is the delivered plan
        before training, if the trained one is delivered.
        """
        folders = {"plan": self.checkpoint, "uniform": self.checkpoints[self.selection.uniform]}
        if self.is_trained:
            folders["untuned"] = self.checkpoints[self.selection.delivered]
        return folders
