"""Linear layers that stay as they are, and why."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from quantizer.structure.experts import LEAST_FEATURES, SeparateExperts

READ_ELSEWHERE = "other code of the model reads its weight"
OTHER_PRODUCT = "it computes something else than a linear layer does"
SHARED = "its weight is shared with another layer"
ROUTER = "it chooses experts"
SMALL = "it would be stored larger than it is"

_OWN_METHODS = frozenset(["__init__", "_init_weights", "reset_parameters"])


def kept_layers(model: nn.Module, path: str, blocks: nn.ModuleList) -> dict[str, str]:
    """Return the linear layers of the blocks that are not quantized, with the reason, by name.

    A weight that the model's code reads by itself (`self.x_proj.weight`, as fused kernels do) must
    stay a tensor. The code is read for that, as such kernels run on some machines only; parts of it
    that the model's configuration rules out are left out.

    Args:
        model: the model, in linear form.
        path: path of its blocks.
        blocks: the blocks.
    """
    owners: dict[int, int] = {}
    for linear in _linears(model):
        owners[id(linear.weight)] = owners.get(id(linear.weight), 0) + 1
    read = {id(each) for module in model.modules() for each in _read_by_code(module, blocks)}
    kept: dict[str, str] = {}
    for index, block in enumerate(blocks):
        for kind, linear in block.named_modules(remove_duplicate=False):
            if not isinstance(linear, nn.Linear):
                continue
            if id(linear) in read:
                kept[f"{path}.{index}.{kind}"] = READ_ELSEWHERE
            elif owners.get(id(linear.weight), 1) > 1:
                kept[f"{path}.{index}.{kind}"] = SHARED
            elif _chooses_experts(block, kind):
                kept[f"{path}.{index}.{kind}"] = ROUTER
            elif (reason := _own_reason(linear)) is not None:
                kept[f"{path}.{index}.{kind}"] = reason
    return kept


def _own_reason(linear: nn.Linear) -> str | None:
    """Return why a layer stays wherever it is; None if it need not."""
    cls: Any = type(linear)
    if linear.weight is not None and not _is_linear(cls):
        return OTHER_PRODUCT
    if min(linear.in_features, linear.out_features) < LEAST_FEATURES:
        return SMALL
    return None


@cache
def _is_linear(cls: type[nn.Linear]) -> bool:
    """Return whether a subclass of `nn.Linear` computes what that does: tried on a small one."""
    if cls.forward is nn.Linear.forward:
        return True
    small = nn.Linear(4, 4, device="meta")  # draws no random numbers
    small.weight = nn.Parameter(torch.arange(16.0, device="cpu").view(4, 4))
    small.bias = nn.Parameter(torch.arange(4.0, device="cpu"))
    states = torch.ones(2, 4, device="cpu")
    expected = small(states)
    small.__class__ = cls
    try:
        return torch.allclose(small(states), expected, atol=1e-5)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False


def _linears(model: nn.Module) -> Iterator[nn.Linear]:
    for _, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear) and module.weight is not None:
            yield module


def _chooses_experts(block: nn.Module, kind: str) -> bool:
    """Return whether a layer stands beside experts and has one output for each of them."""
    linear = block.get_submodule(kind)
    parent, _, _ = kind.rpartition(".")
    while parent:
        for child in block.get_submodule(parent).children():
            around = any(each is linear for each in child.modules())
            if not around and linear.out_features in _expert_counts(child):
                return True
        parent, _, _ = parent.rpartition(".")
    return False


def _expert_counts(module: nn.Module) -> set[int]:
    """Return the number of experts in a module, without and with those that have no weights."""
    if isinstance(module, SeparateExperts):
        return {module.expert_count, getattr(module, "total_experts", module.expert_count)}
    experts = list(module.children()) if isinstance(module, nn.ModuleList) else []
    alike = len({type(each) for each in experts}) == 1
    return {len(experts)} if alike and len(experts) > 1 else set()


def _read_by_code(module: nn.Module, blocks: nn.ModuleList) -> Iterator[nn.Linear]:
    """Yield the linear layers whose weight the class of a module reads.

    What it reads of a variable, as in `block.attention.output.weight`, counts for every block.
    """
    if type(module).__module__.startswith("torch."):
        return
    cls: Any = type(module)  # mypy takes a class of modules for one that has no hash
    for read in _weight_reads(cls):
        if any(_is_false(test, module) for test in read.tests):
            continue
        for start in [module] if read.of_self else blocks:
            found: Any = start
            for name in read.names:
                found = getattr(found, name, None)
            if isinstance(found, nn.Linear):
                yield found


@dataclass(frozen=True, slots=True)
class _Read:
    """A place in code that reads `self.a.b.weight`, or `block.a.b.weight` of a variable.

    Attributes:
        tests: the conditions around it.
        of_self: whether it starts at `self`.
        names: ("a", "b").
    """

    tests: tuple[str, ...]
    of_self: bool
    names: tuple[str, ...]


@cache
def _weight_reads(cls: type[nn.Module]) -> tuple[_Read, ...]:
    """Return each place in a class that reads the weight of a part of it."""
    reads: list[_Read] = []
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] in {"torch", "builtins"}:
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            continue
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef) and function.name not in _OWN_METHODS:
                reads += _reads(function.body, ())
    return tuple(dict.fromkeys(reads))


def _reads(nodes: list[Any], tests: tuple[str, ...]) -> Iterator[_Read]:
    for node in nodes:
        if isinstance(node, ast.If | ast.IfExp):
            yield from _reads([node.test], tests)
            body = node.body if isinstance(node.body, list) else [node.body]
            orelse = node.orelse if isinstance(node.orelse, list) else [node.orelse]
            yield from _reads(body, (*tests, ast.unparse(node.test)))
            yield from _reads(orelse, (*tests, f"not ({ast.unparse(node.test)})"))
            continue
        if isinstance(node, ast.Attribute) and node.attr == "weight":
            root, names = _path(node.value)
            if names and root is not None:
                yield _Read(tests, root == "self", names)
        yield from _reads(list(ast.iter_child_nodes(node)), tests)


def _path(node: ast.expr) -> tuple[str | None, tuple[str, ...]]:
    """Return ("x", ("a", "b")) for `x.a.b`; None and nothing for other expressions."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return (node.id, tuple(reversed(names))) if isinstance(node, ast.Name) else (None, ())


def _is_false(test: str, module: nn.Module) -> bool:
    """Return whether a condition is about plain attributes, and does not hold for a module.

    Whatever depends on tensors or the machine may hold elsewhere. Packed models are not in training
    mode, so what runs only there counts as ruled out.
    """
    tree = ast.parse(test, mode="eval")
    return _value(tree.body, module) is False


def _value(node: ast.expr, module: nn.Module) -> object:
    """Return the value of a simple expression about `self`; None if it cannot be known."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        operand = _value(node.operand, module)
        return None if operand is None else not operand
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        return _comparison(node, module)
    if isinstance(node, ast.BoolOp):
        return _junction(node, module)
    root, names = _path(node)
    return _attribute(names, module) if root == "self" else None


def _attribute(names: tuple[str, ...], module: nn.Module) -> object:
    """Return the value of `self.a.b` if it is plain; None if not, or if there is no such path."""
    if names == ("training",):
        return False
    found: Any = module if names else None
    for name in names:
        found = getattr(found, name, None)
    return found if isinstance(found, bool | int | float | str) else None


def _junction(node: ast.BoolOp, module: nn.Module) -> bool | None:
    """Return the value of `and` or `or`; None if it cannot be known."""
    values = [_value(each, module) for each in node.values]
    decides = isinstance(node.op, ast.Or)  # a true operand decides `or`, a false one `and`
    if any(value is not None and bool(value) is decides for value in values):
        return decides
    return None if None in values else not decides


def _comparison(node: ast.Compare, module: nn.Module) -> bool | None:
    left, right = _value(node.left, module), _value(node.comparators[0], module)
    if not (isinstance(left, int | float) and isinstance(right, int | float)):
        return None
    holds = {
        ast.Gt: left > right,
        ast.GtE: left >= right,
        ast.Lt: left < right,
        ast.LtE: left <= right,
        ast.Eq: left == right,
        ast.NotEq: left != right,
    }
    return holds.get(type(node.ops[0]))
