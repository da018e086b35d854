"""`register_layer`: third-party layer classes, and which of their parameters become 4-bit."""

from collections.abc import Callable, Mapping
from typing import Any

from q4jax.convert.einsum import BinaryEinsum
from q4jax.convert.kernel_axes import KernelAxes

Axes = Mapping[str, KernelAxes | str]
"""The weights of a module: a parameter's name to its axes, or to the einsum that uses it."""
Describe = Callable[..., Axes | str]

_DESCRIPTIONS: dict[type, Describe] = {}


def register_layer(cls: type, describe: Describe) -> None:
    """Register a layer class, so that models that use it can be quantized.

    Its layers keep their class and their forward code. Only their weights become 4-bit, and are
    dequantized when the layer reads them.

    Args:
      cls: a class of `nnx.Module`s or of Linen modules; subclasses are included.
      describe: a function of a module, and in Linen also of the arguments that it was called with.
        It returns the weights, a dict from the name of a parameter to its `KernelAxes` or to the
        einsum that uses it; or a string with the reason why this module cannot be quantized.

    Raises:
      TypeError: cls is not a class, or describe is not a function.

    Examples:
      >>> import jax, jax.numpy as jnp, q4jax
      >>> from flax import nnx
      >>> class Heads(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.w = nnx.Param(jax.random.normal(rngs.params(), (4, 64, 16)))
      ...     def __call__(self, x):
      ...         return jnp.einsum("BTD,NDH->BTNH", x, self.w[...])
      >>> q4jax.register_layer(Heads, lambda module: {"w": "BTD,NDH->BTNH"})
      >>> model = q4jax.quantize_model(Heads(nnx.Rngs(0)))
      >>> type(model).__name__, model(jnp.ones((1, 2, 64))).shape, model.w.weight
      ('Heads', (1, 2, 4, 16), Params4bit(uint8[64, 32], nf4_b64_n256_float32_64x64))
    """
    if not isinstance(cls, type) or not callable(describe):
        raise TypeError(f"register_layer takes a class and a function, got {cls!r}, {describe!r}")
    _DESCRIPTIONS[cls] = describe


def describe_layer(module: Any, shapes: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Return the axes of a registered module's weights by name.

    Args:
      module: a module of any class.
      shapes: the shapes of its parameters, without stacked axes where they are known.
      *args: the arguments that a Linen module was called with.
      **kwargs: its keyword arguments.

    Returns:
      The axes by name; a string with the reason why the module cannot be quantized; or None where
      its class is not registered.
    """
    cls = next((cls for cls in type(module).__mro__ if cls in _DESCRIPTIONS), None)
    if cls is None:
        return None
    found = _DESCRIPTIONS[cls](module, *args, **kwargs)
    return found if isinstance(found, str) else resolve_axes(found, shapes)


def resolve_axes(found: Axes, shapes: Mapping[str, Any]) -> dict[str, KernelAxes] | str:
    """Turn einsums into axes; return a string with the reason where one does not fit."""
    resolved: dict[str, KernelAxes] = {}
    for name, axes in found.items():
        if name not in shapes:
            return f"it has no parameter {name!r}, but {sorted(shapes)}"
        full = tuple(shapes[name])
        try:
            if isinstance(axes, str):
                einsum = BinaryEinsum.parse(axes)
                axes = einsum.kernel_axes(full[-len(einsum.w) :])
        except ValueError as error:
            return str(error)
        if full[-len(axes.shape) :] != axes.shape:
            return f"{name} is {list(full)}, not {list(axes.shape)}"
        resolved[name] = axes
    return resolved
