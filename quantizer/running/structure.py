"""Find the decoder blocks of a model and the linear layers in them, by the model's structure."""

from torch import nn

from quantizer.errors import ModelError
from quantizer.plans.plan import LayerSpec


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the path and the list of the model's decoder blocks.

    The blocks are the `nn.ModuleList` with the most weights in `nn.Linear` layers, among those
    whose members are all of one class. Lists nested in blocks, such as lists of experts, hold fewer
    weights than the list around them.

    Raises:
        ModelError: no list of modules holds a linear layer.
    """
    best_name = ""
    best: nn.ModuleList | None = None
    best_weights = 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len({type(member) for member in module}) != 1:
            continue
        weights = sum(
            linear.out_features * linear.in_features
            for linear in module.modules()
            if isinstance(linear, nn.Linear)
        )
        if weights > best_weights:
            best_name = name
            best = module
            best_weights = weights
    if best is None:
        raise ModelError(
            f"{type(model).__name__} has no list of decoder blocks that hold nn.Linear layers; it "
            "is not supported"
        )
    return best_name, best


def find_layers(model: nn.Module) -> tuple[LayerSpec, ...]:
    """Return every `nn.Linear` in the decoder blocks, in the order of the model's modules.

    Raises:
        ModelError: see `find_blocks`.
    """
    path, blocks = find_blocks(model)
    return tuple(
        LayerSpec(f"{path}.{index}.{kind}", index, kind, linear.out_features, linear.in_features)
        for index, block in enumerate(blocks)
        for kind, linear in block.named_modules()
        if isinstance(linear, nn.Linear)
    )
