"""Iterate over the modules of an NNX model, or replace them in a copy that shares the arrays."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from flax import nnx

M = TypeVar("M")
_LINEN = "flax.linen."
Replace = Callable[[str, Any], Any]


def check_module(model: Any) -> None:
    """Raise TypeError unless a model is an nnx module; Linen's are named as such."""
    if isinstance(model, nnx.Module):
        return
    in_linen = any(f"{cls.__module__}.".startswith(_LINEN) for cls in type(model).__mro__)
    hint = "; a Linen model is quantized by q4jax.linen (docs/linen.md)" if in_linen else ""
    raise TypeError(f"model must be an nnx.Module, got {type(model).__name__}{hint}")


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
            if holds(nnx.Module, value):
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


def holds(kind: type | tuple[type, ...], value: Any) -> bool:
    """Return whether a value is of a kind, or a container with such a value."""
    if isinstance(value, kind):
        return True
    children = value.values() if isinstance(value, dict) else value
    return isinstance(value, (dict, list, tuple)) and any(holds(kind, v) for v in children)


def holds_parameters(module: nnx.Module) -> bool:
    """Return whether a module has an `nnx.Param` of its own, not in a module below it."""
    return any(holds(nnx.Param, value) for value in vars(module).values())


def iter_modules(model: Any) -> Iterable[tuple[str, nnx.Module]]:
    """Return (dotted path, module) for every module that `replace_modules` visits."""
    found: list[tuple[str, nnx.Module]] = []

    def note(path: str, module: nnx.Module) -> nnx.Module:
        found.append((path, module))
        return module

    replace_modules(model, note)
    return found
