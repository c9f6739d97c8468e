"""What a checkpoint holds: packed layers, and all else as the original's files have it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from quantizer.conversion.tensor_names import LoadingNames, stored_names
from quantizer.models.folder import ModelFolder
from quantizer.models.loading import bare_model
from quantizer.models.weight_files import find_weight_files
from quantizer.plans.plan import Plan


@dataclass(frozen=True, slots=True)
class Contents:
    """The tensors of a checkpoint.

    Attributes:
        stored: what each quantized layer is called in the files, by its name in the model.
        packed: tensors of quantized layers, and parameters that the original's files hold in one
            tensor with a quantized layer, by their names in the files.
        carried: names of the tensors that are copied from each file of the original.
    """

    stored: Mapping[str, str]
    packed: Mapping[str, Tensor]
    carried: Mapping[Path, tuple[str, ...]]

    @classmethod
    def of(cls, model: nn.Module, source: ModelFolder, plan: Plan) -> "Contents":
        """Return the contents of a checkpoint.

        Args:
            model: the packed model.
            source: the original.
            plan: names the quantized layers.
        """
        files: dict[Path, list[str]] = {}
        for file in find_weight_files(source.path):
            with safe_open(file, framework="pt") as tensors:
                files[file] = list(tensors.keys())
        bare = bare_model(source)
        names = LoadingNames(bare)
        layers = plan.by_name
        every = [name for own in files.values() for name in own]
        stored = stored_names(names, every, layers)
        replaced = names.fused_parameters(layers)
        replaced |= _tied_to(bare, replaced)
        carried: dict[Path, tuple[str, ...]] = {}
        beside: set[str] = set()
        for file, own in files.items():
            kept = []
            for name in own:
                parameters = names.destination(name).parameters
                if replaced.isdisjoint(parameters):
                    kept.append(name)
                else:
                    beside |= set(parameters) - replaced
            carried[file] = tuple(kept)
        state = model.state_dict()
        dtype = getattr(torch, source.dtype)
        packed = {name: state[name].to(dtype) for name in sorted(beside & state.keys())}
        for layer, prefix in stored.items():
            for leaf, each in model.get_submodule(layer).state_dict().items():
                packed[f"{prefix}.{leaf}"] = each.to(dtype) if leaf == "bias" else each
        return cls(stored, packed, carried)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors with their names; those of the original are read one by one."""
        for file, own in self.carried.items():
            with safe_open(file, framework="pt") as tensors:
                for name in own:
                    yield name, tensors.get_tensor(name)
        for name, tensor in self.packed.items():
            yield name, tensor.detach().cpu().contiguous()


def _tied_to(bare: Any, parameters: set[str]) -> set[str]:
    """Return the parameters that share the storage of some others in the model."""
    tied: Mapping[str, str] = getattr(bare, "all_tied_weights_keys", None) or {}
    found = {name for name, source in tied.items() if source in parameters}
    return found | {source for name, source in tied.items() if name in parameters}
