"""Layers that must share one fidelity because the inference engine fuses them.

vLLM and SGLang load the q, k and v projections as one matrix, gate and up projections as another,
and all experts of a block as one layer; each of these needs a single fidelity. llama.cpp stores the
experts of a block as one tensor for each role. transformers runs every layer by itself.
"""

from collections import defaultdict
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from allocator.errors import RuleError
from quantizer.plans.plan import LayerSpec

TARGETS = ("transformers", "vllm", "sglang", "llama.cpp")
"""Inference engines whose fused layers are known."""

_FUSED = (
    frozenset({"q_proj", "k_proj", "v_proj"}),
    frozenset({"gate_proj", "up_proj"}),
    frozenset({"w1", "w3"}),
    frozenset({"in_proj_qkv", "in_proj_z"}),
    frozenset({"in_proj_qkvz", "in_proj_ba"}),
    frozenset({"in_proj_b", "in_proj_a"}),
)
"""Submodules of one parent module that vLLM and SGLang load as one matrix."""

_EXPERTS = "experts"


def group_layers(
    layers: Sequence[LayerSpec], target: str, ties: Sequence[str] = (), untied: Sequence[str] = ()
) -> tuple[tuple[int, ...], ...]:
    """Return the groups of layers that must share one fidelity.

    Args:
        layers: all layers.
        target: the inference engine, a name in `TARGETS`.
        ties: further ties, such as `*.q_proj,*.o_proj`: in each block, all layers that match one of
            the patterns share one fidelity.
        untied: patterns of layers that the target would tie and that stay free.

    Returns:
        Indices of the layers of each group, in the order of their first members. Each layer is in
        one group.

    Raises:
        RuleError: the target does not exist, or a pattern matches no layer.
    """
    if target not in TARGETS:
        raise RuleError(f"target {target!r} is not known; use one of {', '.join(TARGETS)}")
    free = {at for pattern in untied for at in matching_layers(layers, pattern)}
    tied: dict[tuple[str, ...], set[int]] = defaultdict(set)
    for at, layer in enumerate(layers):
        key = _fused_with(layer, target)
        if key is not None and at not in free:
            tied[key].add(at)
    for tie in ties:
        for pattern in tie.split(","):
            for at in matching_layers(layers, pattern.strip()):
                tied[tie, str(layers[at].block)].add(at)
    return _merged(len(layers), tied.values())


def _merged(count: int, tied: Collection[set[int]]) -> tuple[tuple[int, ...], ...]:
    """Return the groups of `count` layers after merging tied sets that share a layer."""
    if not tied:
        return tuple((at,) for at in range(count))
    from scipy.cluster.hierarchy import DisjointSet  # noqa: PLC0415  slow to import, rarely needed

    groups = DisjointSet(range(count))
    for members in tied:
        first, *others = members
        for other in others:
            groups.merge(first, other)
    return tuple(sorted(tuple(sorted(group)) for group in groups.subsets()))


def matching_layers(layers: Sequence[LayerSpec], pattern: str) -> list[int]:
    """Return the indices of the layers whose name matches a shell-style pattern.

    Patterns are such as `model.layers.0.*` or `*.down_proj`.

    Raises:
        RuleError: none does.
    """
    matches = [at for at, layer in enumerate(layers) if fnmatchcase(layer.name, pattern)]
    if not matches:
        raise RuleError(
            f"pattern {pattern!r} matches no layer; layers are called {layers[0].name!r} to "
            f"{layers[-1].name!r}"
        )
    return matches


def _fused_with(layer: LayerSpec, target: str) -> tuple[str, ...] | None:
    """Return a key that all layers fused with this one share; None where it is loaded by itself."""
    *path, leaf = layer.kind.split(".")
    if target == "transformers":
        return None
    if _EXPERTS in path:
        parent = path[: path.index(_EXPERTS) + 1]
        return (str(layer.block), *parent, leaf if target == "llama.cpp" else "")
    if target == "llama.cpp":
        return None
    for names in _FUSED:
        if leaf in names:
            return (str(layer.block), *path, *sorted(names))
    return None
