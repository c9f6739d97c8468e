"""Names of tensors in files, and where transformers loads them to.

transformers renames tensors while it reads them, and merges those of experts. Checkpoints keep the
names of the original's files, which other tools know, so both directions are needed.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from quantizer.structure.experts import FusedExperts, fused_experts

_WEIGHT = ".weight"
_EXPERT = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Destination:
    """Where transformers loads a tensor of a file to.

    Attributes:
        parameters: names of the model's parameters that get a part of it.
        layer: the linear layer whose weight it is, by its name in linear form; None if it is no
            layer's, or not exactly one's.
    """

    parameters: tuple[str, ...]
    layer: str | None


class LoadingNames:
    """Tells where transformers loads each tensor of a file to, for one model."""

    def __init__(self, model: Any) -> None:
        """Take a model as transformers builds it, not in linear form; its weights do not matter."""
        transforms = get_model_conversion_mapping(model)
        self._renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        self._converters = [each for each in transforms if isinstance(each, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._parameters = model.state_dict()
        self._experts: dict[str, FusedExperts] = {}
        for name, module in model.named_modules():
            fused = fused_experts(module)
            if fused is not None:
                self._experts[name] = fused

    def fused_experts(self, model: nn.Module) -> list[tuple[str, str, Tensor]]:
        """Return module, name and tensor of each parameter of the model that holds experts."""
        return [
            (path, name, model.get_parameter(f"{path}.{name}"))
            for path, fused in self._experts.items()
            for each in fused.projections
            for name in (each.parameter, each.bias)
            if name and "." not in name
        ]

    def renamed(self, tensor: str) -> str:
        """Return a tensor's name after all renamings alone, as a loader sees it on the way."""
        name: str = rename_source_key(tensor, self._renamings, [], self._prefix, self._parameters)[
            0
        ]
        return name

    def destination(self, tensor: str) -> Destination:
        """Return where a tensor of a file is loaded to."""
        first, pattern = rename_source_key(
            tensor, self._renamings, self._converters, self._prefix, self._parameters
        )
        if first not in self._parameters and tensor in self._parameters:
            first, pattern = tensor, None
        if pattern is None:
            layer = first.removesuffix(_WEIGHT) if first.endswith(_WEIGHT) else None
            return Destination((first,), layer)
        converter = next(each for each in self._converters if pattern in each.source_patterns)
        head, *others = converter.target_patterns
        parameters = (first, *(first.replace(head, other) for other in others))
        return Destination(parameters, self._expert_layer(tensor, first, converter, pattern))

    def _expert_layer(
        self, tensor: str, parameter: str, converter: Any, pattern: str
    ) -> str | None:
        """Return the layer of an expert whose weight is merged into a fused parameter."""
        path, _, leaf = parameter.rpartition(".")
        fused = self._experts.get(path)
        found = _EXPERT.findall(tensor)
        if fused is None or not found or not tensor.endswith(_WEIGHT):
            return None
        own = [each.name for each in fused.projections if each.parameter == leaf]
        if len(own) != len(converter.source_patterns):
            return None
        projection = own[converter.source_patterns.index(pattern)]
        return f"{path}.{found[-1]}.{projection}".removesuffix(".")

    def layer(self, stored: str) -> str:
        """Return the model's name of a layer whose tensors have the prefix `stored` in the file."""
        found = self.destination(f"{stored}{_WEIGHT}").layer
        return found or self.renamed(f"{stored}{_WEIGHT}").removesuffix(_WEIGHT)

    def parameters_of(self, layers: Iterable[str]) -> set[str]:
        """Return the parameters of the model, not in linear form, that layers are parts of.

        They are the weights of layers, and the fused weights and biases of experts.

        Args:
            layers: names of layers in linear form.
        """
        found: set[str] = set()
        for layer in layers:
            path = self._experts_around(layer)
            if path is None:
                found.add(f"{layer}{_WEIGHT}")
                continue
            for each in self._experts[path].projections:
                found |= {f"{path}.{name}" for name in (each.parameter, each.bias) if name}
        return found

    def is_apart(self, layer: str) -> bool:
        """Return whether a layer in linear form is a part of a fused parameter."""
        return self._experts_around(layer) is not None

    def _experts_around(self, layer: str) -> str | None:
        path = layer
        while path and path not in self._experts:
            path = path.rpartition(".")[0]
        return path or None


def stored_names(
    names: LoadingNames, tensors: Iterable[str], layers: Iterable[str]
) -> dict[str, str]:
    """Return what layers are called in the original's files, by layer.

    A layer that is a part of a larger tensor there has its name in the model, in linear form.

    Args:
        names: of the model.
        tensors: names of the tensors in the original's files.
        layers: names of layers in linear form.
    """
    found: Mapping[str, str] = {
        layer: tensor.removesuffix(_WEIGHT)
        for tensor in tensors
        if tensor.endswith(_WEIGHT) and (layer := names.destination(tensor).layer) is not None
    }
    return {layer: found.get(layer, layer) for layer in layers}


class PackedNames(WeightRenaming):  # type: ignore[misc]  # transformers is untyped
    """Renames packed tensors, one by one; transformers applies it after its own renamings."""

    def __init__(self, names: Mapping[str, str]) -> None:
        """Take the new name of each tensor by its name so far."""
        super().__init__("(?!)", "(?!)")  # a pattern that nothing matches
        object.__setattr__(self, "names", dict(names))

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """Return the new name of a tensor, and None: it is not changed."""
        self._was_used = True  # transformers renames back only what this says
        return self.names.get(source_key, source_key), None

    def reverse_transform(self) -> "PackedNames":
        """Return the renaming back."""
        return PackedNames({new: old for old, new in self.names.items()})

    def __deepcopy__(self, memo: Any) -> "PackedNames":
        """Return another that renames the same."""
        return PackedNames(self.names)
