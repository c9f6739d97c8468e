"""A penalty on changes of weights that matter, for block-wise training.

The penalty is lambda * sum g^2 (Wq - W)^2 / sum g^2 W^2 over the layers of a block, g^2 being the
mean squared gradient of the end loss and Wq the weight without its adapter. Source: SigniQ, arXiv
2504.13932. The source has no denominator; with it lambda means the same in every block and model.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantizer.training.latent import LatentLinear


@dataclass(frozen=True, slots=True)
class Penalty:
    """The penalty of a model's layers.

    Attributes:
        weight: lambda.
        squared_gradients: mean squared gradient in each weight, float32 [out, in] by layer name;
            see `quantizer.importance.fisher`.
    """

    weight: float
    squared_gradients: Mapping[str, Tensor]

    def of(self, layers: Mapping[str, LatentLinear], originals: Mapping[str, Tensor]) -> Tensor:
        """Return the penalty of some layers, differentiable; zero if no gradient is above zero.

        Args:
            layers: the layers by name.
            originals: their original weights by name, float32 [out, in].
        """
        change = torch.zeros(())
        whole = torch.zeros(())
        for name, layer in layers.items():
            importance = self.squared_gradients[name]
            squared = (layer.grid_weight() - originals[name]).square()
            change = change.to(importance.device) + (importance * squared).sum()
            whole = whole.to(importance.device) + (importance * originals[name].square()).sum()
        return self.weight * change / whole.clamp(min=torch.finfo(torch.float32).tiny)
