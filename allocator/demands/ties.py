"""Layers that must agree because the engine that serves the model fuses them, and groups of layers made of that.

vLLM and SGLang load q, k and v projections as one matrix, gate and up projections as another, and
all experts of a block as one layer; each must have one fidelity. llama.cpp stores the experts of a
block as one tensor for each role. transformers runs every layer alone.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from allocator.errors import RuleError
from quantizer.plans.plan import LayerSpec

TARGETS = ("transformers", "vllm", "sglang", "llama.cpp")

_FUSED = (
    frozenset({"q_proj", "k_proj", "v_proj"}),
    frozenset({"gate_proj", "up_proj"}),
    frozenset({"w1", "w3"}),
    frozenset({"in_proj_qkv", "in_proj_z"}),
    frozenset({"in_proj_qkvz", "in_proj_ba"}),
    frozenset({"in_proj_b", "in_proj_a"}),
)
"""Names that end in the same parent module and are loaded as one matrix."""

_EXPERTS = "experts"


def group_layers(
    layers: Sequence[LayerSpec], target: str, ties: Sequence[str] = (), untied: Sequence[str] = ()
) -> tuple[tuple[int, ...], ...]:
    """Return the groups of layers that must agree, as indices, in the order of their first members.

    Each layer is in one.

    Args:
        layers: all layers.
        target: a name in `TARGETS`.
        ties: further ties, such as `*.q_proj,*.o_proj`: in each block, all layers that one of the
            patterns names agree.
        untied: patterns of layers that the target would tie and that choose alone all the same.

    Raises:
        RuleError: the target does not exist, or a pattern names no layer.
    """
    if target not in TARGETS:
        raise RuleError(f"target {target!r} is not known; use one of {', '.join(TARGETS)}")
    free = {at for pattern in untied for at in matching(layers, pattern)}
    together: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for at, layer in enumerate(layers):
        key = _fused_with(layer, target)
        if key is not None and at not in free:
            together[key].append(at)
    for tie in ties:
        for at in sorted(
            {at for pattern in tie.split(",") for at in matching(layers, pattern.strip())}
        ):
            together[tie, str(layers[at].block)].append(at)
    return _joined(len(layers), together.values())


def _joined(count: int, together: Iterable[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Return the finest groups of `count` layers in which all that belong together are (union-find)."""
    parent = list(range(count))

    def root(at: int) -> int:
        while parent[at] != at:
            parent[at] = parent[parent[at]]
            at = parent[at]
        return at

    for members in together:
        for at in members[1:]:
            first, second = sorted((root(members[0]), root(at)))
            parent[second] = first
    groups: dict[int, list[int]] = defaultdict(list)
    for at in range(count):
        groups[root(at)].append(at)
    return tuple(tuple(group) for group in groups.values())


def matching(layers: Sequence[LayerSpec], pattern: str) -> list[int]:
    """Return the indices of the layers that a shell-style pattern names, such as `model.layers.0.*` or `*.down_proj`.

    Raises:
        RuleError: there is none.
    """
    found = [at for at, layer in enumerate(layers) if fnmatchcase(layer.name, pattern)]
    if not found:
        raise RuleError(
            f"pattern {pattern!r} names no layer; layers are called {layers[0].name!r} to "
            f"{layers[-1].name!r}"
        )
    return found


def _fused_with(layer: LayerSpec, target: str) -> tuple[str, ...] | None:
    """Return what a layer is loaded together with, or None where it is loaded alone."""
    *path, leaf = layer.kind.split(".")
    if target == "transformers":
        return None
    if _EXPERTS in path:
        place = path.index(_EXPERTS)
        return (str(layer.block), *path[: place + 1], leaf if target == "llama.cpp" else "")
    if target == "llama.cpp":
        return None
    for names in _FUSED:
        if leaf in names:
            return (str(layer.block), *path, *sorted(names))
    return None
