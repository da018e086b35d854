"""`ArraysInStack`: one weight's arrays, left in the arrays of a stack and named by an index."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from q4jax.core.blockwise import WeightArrays


class ArraysInStack(NamedTuple):
    """The arrays of a stack, and which of its weights is meant.

    XLA fuses no slice into a kernel call: a weight that is cut out of a stack, as `jax.lax.scan`
    does, is copied before the kernel reads it. A kernel that is given this reads it in its place.

    Attributes:
      stack: arrays with leading axes in front, one for each index. `absmax` may be without them:
        then it has the scales of the weight that is meant.
      indices: int32 scalars, which whoever reads the arrays clips to the leading axes, as `cut` and
        `flat` do: a kernel can do it for nothing, and before it there would be one more kernel.
    """

    stack: WeightArrays
    indices: tuple[Array, ...]

    def cut(self) -> WeightArrays:
        """Return the weight's own arrays."""

        def one(array: Array) -> Array:
            for number in self.indices:
                array = jax.lax.dynamic_index_in_dim(
                    array, number, keepdims=False, allow_negative_indices=False
                )
            return array

        return jax.tree.map(one, self.stack)

    def flat(self) -> tuple[WeightArrays, Array]:
        """Return the arrays with their leading axes merged into one, and the index in that."""
        lead = self.stack.packed.shape[: len(self.indices)]
        own = self.stack.packed.ndim - len(lead)
        number: Any = jnp.int32(0)
        for size, index in zip(lead, self.indices, strict=True):
            number = number * size + jnp.clip(index, 0, size - 1)

        def merge(array: Array, axes: int) -> Array:
            return array.reshape(math.prod(lead), *array.shape[array.ndim - axes :])

        packed, absmax, nested, offset = self.stack
        return WeightArrays(
            merge(packed, own),
            absmax if absmax.ndim == own else merge(absmax, own),
            None if nested is None else merge(nested, 1),
            None if offset is None else merge(offset, 0),
        ), number
