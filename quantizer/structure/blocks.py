"""Find the decoder blocks of a model and the linear layers in them, by the model's structure."""

from torch import nn

from quantizer.errors import ModelError
from quantizer.plans.plan import LayerSpec
from quantizer.structure.kept import kept_layers


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the path and the list of the model's decoder blocks.

    The blocks are the `nn.ModuleList` with the most parameters in the part of the model that
    transformers calls its decoder (`get_decoder`), so the vision tower of a multi-modal model is
    not taken for its language model; in the whole model if the decoder has none. Lists nested in
    blocks, such as lists of experts, hold fewer parameters than the list around them.

    Raises:
        ModelError: no list of modules holds a linear layer.
    """
    decoder = getattr(model, "get_decoder", lambda: model)()
    for part in (decoder, model):
        lists = [
            (sum(parameter.numel() for parameter in module.parameters()), module)
            for module in (part.modules() if isinstance(part, nn.Module) else ())
            if isinstance(module, nn.ModuleList)
            and any(isinstance(each, nn.Linear) for each in module.modules())
        ]
        if lists:
            blocks = max(lists, key=lambda pair: pair[0])[1]
            path = next(name for name, module in model.named_modules() if module is blocks)
            return path, blocks
    raise ModelError(
        f"{type(model).__name__} has no list of decoder blocks that hold linear layers; it is not "
        "supported"
    )


def find_layers(model: nn.Module) -> tuple[LayerSpec, ...]:
    """Return every linear layer in the decoder blocks, in the order of the model's modules.

    Layers that must stay as they are, see `quantizer.structure.kept`, are left out.

    Raises:
        ModelError: see `find_blocks`.
    """
    path, blocks = find_blocks(model)
    kept = kept_layers(model, path, blocks)
    return tuple(
        LayerSpec(f"{path}.{index}.{kind}", index, kind, linear.out_features, linear.in_features)
        for index, block in enumerate(blocks)
        for kind, linear in block.named_modules()
        if isinstance(linear, nn.Linear) and f"{path}.{index}.{kind}" not in kept
    )
