"""`weight_of_stack`: one weight of a stack, which kernels read where it is."""

from collections.abc import Iterable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from q4jax.core.arrays_in_stack import ArraysInStack
from q4jax.core.blockwise import WeightArrays
from q4jax.core.spec import QuantSpec
from q4jax.core.state import QuantState, unpack_weight, weight_arrays
from q4jax.ops.not_an_array import NotAnArray
from q4jax.ops.params import Params4bit, as_params4bit


@jax.tree_util.register_pytree_node_class
class WeightOfStack(NotAnArray):
    """One weight of a stack; `weight_of_stack` makes it.

    Every function takes it in the place of a `Params4bit`. `matmul_4bit` hands the stack and the
    index to the implementations that take them; elsewhere the weight is cut out of its stack.

    Attributes:
      stack: weights whose arrays all have the leading axes.
      indices: int32 scalars for the first of these axes.
    """

    __slots__ = ("indices", "stack")

    def __init__(self, stack: Params4bit, indices: tuple[Array, ...]):
        self.stack = stack
        self.indices = indices

    def tree_flatten(self) -> tuple[tuple[Any, ...], None]:
        """Return the stack and the index, for jax."""
        return (self.stack, self.indices), None

    @classmethod
    def tree_unflatten(cls, _: None, children: Iterable[Any]) -> "WeightOfStack":
        """Invert `tree_flatten`, for jax; children may be anything."""
        return cls(*children)

    def at(self, number: Array) -> "WeightOfStack":
        """Return one weight of what this is, where that still has leading axes."""
        return WeightOfStack(self.stack, (*self.indices, number))

    def cut(self) -> Params4bit:
        """Return the weight with arrays of its own."""
        return cast("Params4bit", jax.tree.map(self._cut, self.stack))

    def _cut(self, array: Array) -> Array:
        return ArraysInStack(array, self.indices).cut()  # type: ignore[arg-type, return-value]

    @property
    def packed(self) -> Array:
        """The weight's codes, cut out of the stack."""
        return self.cut().packed

    @property
    def quant_state(self) -> QuantState:
        """The weight's state, cut out of the stack."""
        return self.cut().quant_state

    @property
    def arrays(self) -> ArraysInStack:
        """The stack's arrays and the indices, as the implementations take them."""
        return ArraysInStack(self.stack.arrays, self.indices)

    def dequantize(self, dtype: Any = None, *, implementation: str | None = None) -> Array:
        """Return the weight in its full shape: `dequantize_4bit`."""
        return self.cut().dequantize(dtype, implementation=implementation)

    def __repr__(self) -> str:
        return f"WeightOfStack({self.stack!r}, indices={list(self.indices)})"

    def _advice(self) -> str:
        return f"{self!r} is a 4-bit weight and no array: q4jax.matmul_4bit(x, weight) is x @ W.T"


def weight_of_stack(stack: Params4bit | WeightOfStack, *index: Array | int) -> WeightOfStack:
    """Name one weight of a stack, without a copy of it.

    In a scan over layers, scan over their numbers and close over the stack: a kernel then reads a
    layer's weight where it is, whereas a layer that the scan cuts out is copied first.

    Args:
      stack: weights `[*lead, out, in]`, each with statistics of its own, as `jax.vmap` of
        `Params4bit.quantize` or `Params4bit.unstack` makes them.
      *index: integers for the leading axes. Traced ones are clipped to the stack.

    Returns:
      What functions take in the place of a `Params4bit`.

    Raises:
      IndexError: a concrete index is outside the stack.
      ValueError: more indices than leading axes, or none; the weights share statistics.
      TypeError: an index is no integer scalar.

    Examples:
      >>> import jax, jax.numpy as jnp, q4jax
      >>> w = jax.random.normal(jax.random.key(0), (4, 64, 64))
      >>> stack = jax.vmap(lambda w: q4jax.Params4bit.quantize(w, quant_type="nf4"))(w)
      >>> def layer(x, number):
      ...     return q4jax.matmul_4bit(x, q4jax.weight_of_stack(stack, number)), None
      >>> jax.lax.scan(layer, jnp.ones((2, 64)), jnp.arange(4))[0].shape
      (2, 64)
    """
    named = stack if isinstance(stack, WeightOfStack) else WeightOfStack(as_params4bit(stack), ())
    state = named.stack.quant_state
    free = state.lead[len(named.indices) :]
    if state.offset is not None and state.offset.shape != state.lead:
        raise ValueError(
            f"weights of {named.stack!r} share statistics: unstack it, or quantize by jax.vmap"
        )
    if not 0 < len(index) <= len(free):
        raise ValueError(f"{len(index)} indices for the leading axes {list(free)} of {stack!r}")
    for number, size in zip(index, free, strict=False):
        named = named.at(_checked(number, size))
    return named


def _checked(number: Any, size: int) -> Array:
    found = jnp.asarray(number)
    if found.ndim or not jnp.issubdtype(found.dtype, jnp.integer):
        raise TypeError(f"an index must be an integer scalar, got {found.dtype}{list(found.shape)}")
    if not isinstance(found, jax.core.Tracer) and not 0 <= int(np.asarray(found)) < size:
        raise IndexError(f"an index must be at least 0 and below {size}, got {int(found)}")
    return found.astype(jnp.int32)


def spec_of(weight: Params4bit | WeightOfStack) -> QuantSpec:
    """Return the description of a weight in any of its forms."""
    stack = weight.stack if isinstance(weight, WeightOfStack) else weight
    return stack.quant_state.spec


def weight_operand(
    packed: Any, state: QuantState | None
) -> tuple[WeightArrays | ArraysInStack, QuantSpec, tuple[int, ...]]:
    """Return what the products take of a weight in any of its forms, its description and shape.

    Raises:
      TypeError, ValueError: as `unpack_weight`.
    """
    if isinstance(packed, WeightOfStack) and state is None:
        own = as_params4bit(packed.stack).quant_state
        return packed.arrays, own.spec, own.shape[len(packed.indices) :]
    packed, state = unpack_weight(packed, state)
    return weight_arrays(packed, state), state.spec, state.shape
