"""What a checkpoint holds: packed layers, and all else as the original's files have it."""

from collections.abc import Collection, Iterable, Iterator, Mapping
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
class Division:
    """The tensors of the original's files, divided into those that stay and those that do not.

    Attributes:
        stored: what each quantized layer is called in the files, by its name in the model.
        apart: the quantized layers that the model has in one parameter with others, with their
            biases.
        carried: names of the tensors that a checkpoint has as they are.
        replaced: names of those in whose place packed layers come.
        repeated: names of those that are tied to another one in the files; transformers makes them
            from it.
        beside: parameters of the model that are in a replaced tensor together with a layer, and are
            not quantized.
    """

    stored: Mapping[str, str]
    apart: frozenset[str]
    carried: tuple[str, ...]
    replaced: tuple[str, ...]
    repeated: tuple[str, ...]
    beside: tuple[str, ...]


def divide(bare: Any, tensors: Collection[str], layers: Iterable[str]) -> Division:
    """Divide the tensors of the original's files by what a checkpoint does with them.

    Args:
        bare: the model, not in linear form; its weights do not matter.
        tensors: names of all tensors in the files.
        layers: names of the quantized layers, embedding and head, in linear form.
    """
    names = LoadingNames(bare)
    known = list(layers)
    replaced = names.parameters_of(known)
    tied: Mapping[str, str] = getattr(bare, "all_tied_weights_keys", None) or {}
    replaced |= {name for name, source in tied.items() if source in replaced}
    into = {name: names.destination(name).parameters for name in tensors}
    gone = {name for name, parameters in into.items() if not replaced.isdisjoint(parameters)}
    filled = {parameter for parameters in into.values() for parameter in parameters}
    repeated = {
        name
        for name, parameters in into.items()
        if name not in gone and all(tied.get(each) in filled for each in parameters)
    }
    beside = {each for name in gone for each in into[name]} - replaced
    return Division(
        stored=stored_names(names, tensors, known),
        apart=frozenset(layer for layer in known if names.is_apart(layer)),
        carried=tuple(name for name in tensors if name not in gone | repeated),
        replaced=tuple(name for name in tensors if name in gone),
        repeated=tuple(name for name in tensors if name in repeated),
        beside=tuple(sorted(beside)),
    )


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
        every = [name for own in files.values() for name in own]
        division = divide(bare_model(source), every, plan.by_name)
        keeps = set(division.carried)
        dtype = getattr(torch, source.dtype)
        packed = {name: model.get_parameter(name).to(dtype) for name in division.beside}
        for layer, prefix in division.stored.items():
            for leaf, each in model.get_submodule(layer).state_dict().items():
                if leaf != "bias":
                    packed[f"{prefix}.{leaf}"] = each
                elif layer in division.apart:  # other biases are carried
                    packed[f"{prefix}.bias"] = each.to(dtype)
        carried = {
            file: tuple(name for name in own if name in keeps) for file, own in files.items()
        }
        return cls(division.stored, packed, carried)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors with their names; those of the original are read one by one."""
        for file, own in self.carried.items():
            with safe_open(file, framework="pt") as tensors:
                for name in own:
                    yield name, tensors.get_tensor(name)
        for name, tensor in self.packed.items():
            yield name, tensor.detach().cpu().contiguous()
