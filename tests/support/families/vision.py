"""A vision tower for configurations whose own comes from timm, which is not installed."""

from typing import Any

import transformers
from torch import nn
from transformers import Gemma3nVisionConfig
from transformers.utils import is_timm_available


class PlainTower(transformers.PreTrainedModel):
    """A tower that has weights; text alone never passes through it."""

    config_class = Gemma3nVisionConfig
    main_input_name = "pixel_values"

    def __init__(self, config: Any) -> None:
        """Build the tower; its one layer is as wide as the configuration says."""
        super().__init__(config)
        self.mix = nn.Linear(config.hidden_size, config.hidden_size)
        self.post_init()


def register_plain_towers() -> None:
    """Let transformers build a `PlainTower` where it would ask timm."""
    if not is_timm_available():
        transformers.AutoModel.register(Gemma3nVisionConfig, PlainTower, exist_ok=True)
