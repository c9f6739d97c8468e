"""Linear layers that stay as they are, and why."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn

READ_ELSEWHERE = "other code of the model reads its weight"
SHARED = "its weight is shared with another layer"
ROUTER = "it chooses experts"
SMALL = "it would be stored larger than it is"

_LEAST_FEATURES = 8
"""Rows or columns; with fewer, scales and zero points take more than quantizing saves."""
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
    kept: dict[str, str] = {}
    for index, block in enumerate(blocks):
        read = {id(linear) for module in block.modules() for linear in _read_by_code(module)}
        for kind, linear in block.named_modules(remove_duplicate=False):
            if not isinstance(linear, nn.Linear):
                continue
            reason = None
            if id(linear) in read:
                reason = READ_ELSEWHERE
            elif owners.get(id(linear.weight), 1) > 1:
                reason = SHARED
            elif min(linear.in_features, linear.out_features) < _LEAST_FEATURES:
                reason = SMALL
            elif _chooses_experts(block, kind):
                reason = ROUTER
            if reason is not None:
                kept[f"{path}.{index}.{kind}"] = reason
    return kept


def _linears(model: nn.Module) -> Iterator[nn.Linear]:
    for _, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear) and module.weight is not None:
            yield module


def _chooses_experts(block: nn.Module, kind: str) -> bool:
    """Return whether a layer stands beside experts and has one output for each of them."""
    parent, _, _ = kind.rpartition(".")
    linear = block.get_submodule(kind)
    while parent:
        around = block.get_submodule(parent)
        for child in around.children():
            experts = [each for each in child.children() if isinstance(each, nn.Module)]
            if len(experts) == linear.out_features and _alike(experts):
                return True
        parent, _, _ = parent.rpartition(".")
    return False


def _alike(experts: list[nn.Module]) -> bool:
    return len(experts) > 1 and len({type(each) for each in experts}) == 1


def _read_by_code(module: nn.Module) -> Iterator[nn.Linear]:
    """Yield the linear layers whose weight the class of a module reads."""
    if type(module).__module__.startswith("torch."):
        return
    cls: Any = type(module)  # mypy takes a class of modules for one that has no hash
    for test_chain, names in _weight_reads(cls):
        if any(_is_false(test, module) for test in test_chain):
            continue
        found: Any = module
        for name in names:
            found = getattr(found, name, None)
        if isinstance(found, nn.Linear):
            yield found


@cache
def _weight_reads(
    cls: type[nn.Module],
) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]:
    """Return each `self.a.b.weight` in a class as the conditions around it and ("a", "b")."""
    reads: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
    for base in cls.__mro__:
        if not base.__module__.startswith("transformers.models"):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            continue
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef) and function.name not in _OWN_METHODS:
                reads += _reads(function.body, ())
    return tuple(dict.fromkeys(reads))


def _reads(
    nodes: list[Any], tests: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    for node in nodes:
        if isinstance(node, ast.If | ast.IfExp):
            yield from _reads([node.test], tests)
            body = node.body if isinstance(node.body, list) else [node.body]
            orelse = node.orelse if isinstance(node.orelse, list) else [node.orelse]
            yield from _reads(body, (*tests, ast.unparse(node.test)))
            yield from _reads(orelse, (*tests, f"not ({ast.unparse(node.test)})"))
            continue
        if isinstance(node, ast.Attribute) and node.attr == "weight":
            names = _path_from_self(node.value)
            if names:
                yield tests, names
        yield from _reads(list(ast.iter_child_nodes(node)), tests)


def _path_from_self(node: ast.expr) -> tuple[str, ...]:
    """Return ("a", "b") for `self.a.b`; nothing for other expressions."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name) and node.id == "self":
        return tuple(reversed(names))
    return ()


def _is_false(test: str, module: nn.Module) -> bool:
    """Return whether a condition is about plain attributes alone, and does not hold for a module.

    `self.training` and whatever depends on tensors or the machine may hold elsewhere.
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
    names = _path_from_self(node)
    if not names or "training" in names:
        return None
    found: Any = module
    for name in names:
        found = getattr(found, name, None)
    return found if isinstance(found, bool | int | float | str) else None


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
