"""A 4-bit weight in the place of a parameter of a module that does not know of 4 bits.

The module reads its parameter and gets the decoded array, in the shape that it has always had, so
its forward is its own code and computes what it would with the dequantized weights, bit for bit.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import jax
from jax import Array
from jax.typing import DTypeLike

from q4jax.convert.kernel_axes import Equation, Fold
from q4jax.ops.params import Params4bit, quantize_stacked

Folds = Mapping[str, Fold | str]
"""The weights of a module: name to its fold, or to the einsum that uses it."""
Describe = Callable[..., Folds | str]

_DESCRIPTIONS: dict[type, Describe] = {}


class Hosted4bit:
    """A 4-bit weight, decoded whenever its owner reads it; a pytree.

    Args:
      weight: `[*stack, *batch, out, in]`.
      fold: how the owner's array becomes that.
      dtype: what it is decoded to.
      kind: what the owner held: a type of Variable, or None.
    """

    def __init__(self, weight: Params4bit, fold: Fold, dtype: Any, kind: Any = None):
        self.weight = weight
        self.fold = fold
        self.dtype = dtype
        self.kind = kind

    def decode(self) -> Array:
        """The owner's array."""
        return self.fold.unfold(self.weight.dequantize(dtype=self.dtype))

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], Any]:
        """The weight with its key, for jax."""
        return [(jax.tree_util.GetAttrKey("weight"), self.weight)], (
            self.fold,
            self.dtype,
            self.kind,
        )

    @classmethod
    def tree_unflatten(cls, static: Any, leaves: Iterable[Any]) -> Self:
        """The inverse, for jax; leaves may be anything."""
        (weight,) = leaves
        return cls(weight, *static)

    @classmethod
    def quantize(
        cls, w: Array, fold: Fold, name: str, *, dtype: DTypeLike | None, kind: Any, **settings: Any
    ) -> Self:
        """From the owner's array; ValueError, with its name, as `quantize_4bit`."""
        try:
            weight = quantize_stacked(fold.fold(w), name, **settings)
        except ValueError as error:
            raise ValueError(str(error) if name in str(error) else f"{name}: {error}") from None
        return cls(weight, fold, weight.quant_state.dtype if dtype is None else dtype, kind)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.weight!r}, shape={list(self.fold.shape)})"


def register_layer(cls: type, describe: Describe) -> None:
    """Teaches q4jax a class of layers, so that models made of them can be quantized.

    Its weights become 4-bit where they are and are decoded when the layer reads them: the forward
    stays the layer's own.

    Args:
      cls: a class of `nnx.Module`s or of Linen modules; subclasses are included.
      describe: called with a module, and in Linen also with the arguments that it was called with.
        Returns the weights: name of the parameter to a `Fold`, or to the einsum that uses it; or a
        string, why this module cannot be quantized.

    Raises:
      TypeError: cls is no class, or describe cannot be called.

    Example:
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
    """The folds of a module's weights by name; a string, why not; None for an unknown class.

    Args:
      module: of any class.
      shapes: shapes of its parameters, without stacked axes where they are known.
      *args: what a Linen module was called with.
      **kwargs: the same.
    """
    kind = next((kind for kind in type(module).__mro__ if kind in _DESCRIPTIONS), None)
    if kind is None:
        return None
    found = _DESCRIPTIONS[kind](module, *args, **kwargs)
    return found if isinstance(found, str) else as_folds(found, shapes)


def as_folds(found: Folds, shapes: Mapping[str, Any]) -> dict[str, Fold] | str:
    """Einsums as folds; a string where one has no place or is no product."""
    folds: dict[str, Fold] = {}
    for name, fold in found.items():
        if name not in shapes:
            return f"it has no parameter {name!r}, but {sorted(shapes)}"
        full = tuple(shapes[name])
        try:
            if isinstance(fold, str):
                equation = Equation.parse(fold)
                fold = equation.fold(full[-len(equation.w) :])
        except ValueError as error:
            return str(error)
        if full[-len(fold.shape) :] != fold.shape:
            return f"{name} is {list(full)}, not {list(fold.shape)}"
        folds[name] = fold
    return folds
