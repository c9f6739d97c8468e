"""Registers with transformers the checkpoint format whose `quant_method` is "bitwright".

`import quantizer` arranges that this module is imported together with
`transformers.quantizers.auto`, so that importing the package alone loads neither torch nor
transformers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quantizer.conversion.tensor_names import LoadingNames, PackedNames
from quantizer.errors import CheckpointError
from quantizer.modules.embedding import QuantizedEmbedding, TiedHead
from quantizer.modules.linear import QuantizedLinear, get_linear, replace_linear
from quantizer.packed.dequantize import check_indices
from quantizer.plans.fidelity import Fidelity
from quantizer.structure.linear_form import to_linear_form

QUANT_METHOD = "bitwright"
FORMAT_VERSION = 2


@register_quantization_config(QUANT_METHOD)
class BitwrightConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is untyped
    """The `quantization_config` in the `config.json` of a quantized checkpoint.

    Attributes:
        quant_method: `QUANT_METHOD`.
        version: version of the format.
        layers: name of each quantized layer's fidelity, by the layer's name.
        tied: for each head that shares an embedding's table, the embedding's name by the head's.

    Raises:
        CheckpointError: this package does not read the format version, or `layers` is empty.
    """

    def __init__(
        self,
        layers: dict[str, str] | None = None,
        version: int = FORMAT_VERSION,
        tied: dict[str, str] | None = None,
        **_: object,
    ) -> None:
        """Check the version, and store the fields; further ones are ignored."""
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"checkpoint format version {version}; this bitwright reads version "
                f"{FORMAT_VERSION}"
            )
        if not layers:
            raise CheckpointError("quantization_config names no layers")
        self.quant_method = QUANT_METHOD
        self.version = version
        self.layers = layers
        self.tied = tied or {}


@register_quantizer(QUANT_METHOD)
class BitwrightQuantizer(HfQuantizer):  # type: ignore[misc]  # transformers is untyped
    """Replaces layers of a model by packed ones before transformers reads the weights."""

    requires_calibration = True
    quantization_config: BitwrightConfig

    def __init__(self, quantization_config: BitwrightConfig, **options: Any) -> None:
        """Take the configuration."""
        super().__init__(quantization_config, **options)
        self._stand_ins: list[tuple[nn.Module, str]] = []
        self._packed_names = PackedNames({})

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> nn.Module:
        names = LoadingNames(model)
        fused = names.fused_experts(model)
        to_linear_form(model)
        for path, leaf, tensor in fused:
            self._stand_in(model.get_submodule(path), leaf, tensor)
        stored: dict[str, str] = {}
        with torch.device("meta"):
            for prefix, fidelity in self.quantization_config.layers.items():
                name = names.layer(prefix)
                packed = _empty_packed(model, name, Fidelity.parse(fidelity))
                self._stand_in(packed, "weight", model.get_submodule(name).weight)
                replace_linear(model, name, packed)
                stored |= {f"{prefix}.{leaf}": f"{name}.{leaf}" for leaf in packed.state_dict()}
            for head, prefix in self.quantization_config.tied.items():
                _check_is_head(model, head)
                table = _quantized_embedding(model, names.layer(prefix))
                replace_linear(model, head, TiedHead(table))
        if checkpoint_files:
            _check_tensors(checkpoint_files, names, stored)
        self._packed_names = PackedNames({names.renamed(key): new for key, new in stored.items()})
        return model

    def _stand_in(self, owner: nn.Module, attribute: str, replaced: Any) -> None:
        """Give a module an attribute that packing took away, while transformers loads the model.

        transformers initialises the weights of all modules, but leaves out those with this mark.
        """
        tensor = torch.empty_like(replaced, device="meta")
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # noqa: SLF001
        vars(owner)[attribute] = tensor
        self._stand_ins.append((owner, attribute))

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Return the renamings and conversions of the class, and those of packed tensors."""
        conversions: list[Any] = super().update_weight_conversions(weight_conversions, model)
        return [*conversions, self._packed_names]

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        for owner, attribute in self._stand_ins:
            vars(owner).pop(attribute, None)
        self._stand_ins.clear()
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLinear):
                check_indices(
                    name, dict(module.named_buffers()), module.out_features, module.in_features
                )
                module.prepare()
            elif isinstance(module, QuantizedEmbedding):
                check_indices(
                    name, dict(module.named_buffers()), module.num_embeddings, module.embedding_dim
                )
                if self.quantization_config.tied:  # otherwise its rows are only looked up
                    module.prepare()
        return model

    def is_serializable(self) -> bool:
        """Return True: packed layers are saved as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: adapters can be trained beside packed layers, whose own weights get no gradient."""
        return True


def _empty_packed(model: nn.Module, name: str, fidelity: Fidelity) -> nn.Module:
    """Return the empty packed module for an embedding or a linear layer."""
    module = dict(model.named_modules()).get(name)
    if isinstance(module, nn.Embedding):
        return QuantizedEmbedding(fidelity, module)
    linear = get_linear(model, name)
    has_bias = linear.bias is not None
    return QuantizedLinear(
        fidelity, linear.in_features, linear.out_features, bias=has_bias, dtype=linear.weight.dtype
    )


def _check_is_head(model: Any, name: str) -> None:
    """Refuse a name that is not that of the model's output head.

    Raises:
        CheckpointError: it is not.
    """
    if dict(model.named_modules()).get(name) is not model.get_output_embeddings():
        raise CheckpointError(
            f"the checkpoint says that {name!r} shares an embedding's table, but that is not the "
            "model's head"
        )


def _quantized_embedding(model: nn.Module, name: str) -> QuantizedEmbedding:
    """Return the quantized embedding of that name.

    Raises:
        CheckpointError: there is none.
    """
    module = dict(model.named_modules()).get(name)
    if not isinstance(module, QuantizedEmbedding):
        raise CheckpointError(
            f"the checkpoint says that the head shares the table of {name!r}, which is no "
            "quantized embedding"
        )
    return module


def _check_tensors(files: Sequence[str], names: LoadingNames, wanted: Mapping[str, str]) -> None:
    """Refuse a checkpoint that lacks a tensor of a packed layer; transformers would fill in zeros.

    Args:
        files: its weight files.
        names: tells where transformers loads their tensors to.
        wanted: names in the model by the names in the files.

    Raises:
        CheckpointError: names the first missing tensor.
    """
    stored: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            stored.update(tensors.keys())
    biases = {
        parameter
        for name in stored
        if name.endswith("bias")
        for parameter in names.destination(name).parameters
    }
    missing = [name for name, own in wanted.items() if name not in stored and own not in biases]
    if missing:
        raise CheckpointError(
            f"the checkpoint lacks {len(missing)} packed tensors, {missing[0]!r} first; get its "
            "files anew"
        )
