"""Iterate over the modules of an NNX model, or replace them in a copy that shares the arrays."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from flax import nnx

M = TypeVar("M")
Replace = Callable[[str, Any], Any]


def replace_modules(model: M, replace: Replace) -> M:
    """Copy a model, sharing its arrays, with modules replaced.

    Args:
      model: an nnx module. Modules in `nnx.List`, `nnx.Dict`, `nnx.data` containers, lists, tuples
        and dicts are reached; one that is reached twice is replaced once.
      replace: a function from (dotted path, module) to another module, or to the same one, whose
        children are visited then.
    """
    done: dict[int, tuple[Any, Any]] = {}

    def visit(path: str, node: Any) -> Any:
        if id(node) not in done:
            done[id(node)] = node, node  # a cycle stops here
            done[id(node)] = node, _visit_children(path, node, replace, visit)
        return done[id(node)][1]

    return visit("", nnx.clone(model))


def _visit_children(path: str, node: Any, replace: Replace, visit: Replace) -> Any:
    def child(name: Any, value: Any) -> Any:
        return visit(f"{path}.{name}" if path else str(name), value)

    if isinstance(node, nnx.Module):
        new = replace(path, node)
        if new is not node:
            return new
    if isinstance(node, nnx.Module):
        for name, value in list(vars(node).items()):
            if _holds_modules(value):
                new = child(name, value)
                if new is not value:
                    setattr(node, name, new if isinstance(new, nnx.Module) else nnx.data(new))
    elif isinstance(node, list):
        node[:] = [child(i, value) for i, value in enumerate(node)]
    elif isinstance(node, dict):
        node.update({name: child(name, value) for name, value in node.items()})
    elif isinstance(node, tuple):
        values = [child(i, value) for i, value in enumerate(node)]
        if any(a is not b for a, b in zip(values, node, strict=True)):
            return type(node)(*values) if hasattr(node, "_fields") else tuple(values)
    return node


def _holds_modules(value: Any) -> bool:
    if isinstance(value, nnx.Module):
        return True
    if isinstance(value, dict):
        return any(map(_holds_modules, value.values()))
    return isinstance(value, (list, tuple)) and any(map(_holds_modules, value))


def iter_modules(model: Any) -> Iterable[tuple[str, nnx.Module]]:
    """Return (dotted path, module) for every module that `replace_modules` visits."""
    found: list[tuple[str, nnx.Module]] = []

    def note(path: str, module: nnx.Module) -> nnx.Module:
        found.append((path, module))
        return module

    replace_modules(model, note)
    return found
