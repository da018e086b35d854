"""`KernelAxes`: a kernel of any shape as matrices `[out, in]`, whose rows hold the blocks."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from jax import Array


@dataclasses.dataclass(frozen=True)
class KernelAxes:
    """The roles of a kernel's axes, by which it becomes matrices `[*batch, out, in]` and back.

    The axes that are neither input nor batch axes are output axes. Input and output axes keep the
    order that they have in the kernel.

    Args:
      shape: shape of the kernel, without the leading axes that `vmap` or `scan` stack.
      in_axes: the axes that a product with the input sums over; blocks run along them.
      batch_axes: the axes that kernel, input and result share, such as that of experts; each
        index has a matrix of its own.

    Raises:
      ValueError: an axis does not exist or is named twice; no input axis or no output axis is left.

    Examples:
      >>> import jax.numpy as jnp, q4jax
      >>> heads = q4jax.KernelAxes((8, 256, 32), in_axes=(1,))  # [heads, features, width]
      >>> heads.to_matrices(jnp.ones((8, 256, 32))).shape, heads.lead, heads.matrix
      ((256, 256), (), (256, 256))
      >>> experts = q4jax.KernelAxes((4, 64, 128), in_axes=(1,), batch_axes=(0,))
      >>> experts.to_matrices(jnp.ones((4, 64, 128))).shape
      (4, 128, 64)
    """

    __module__ = "q4jax"

    shape: tuple[int, ...]
    in_axes: tuple[int, ...]
    batch_axes: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ("shape", "in_axes", "batch_axes"):
            object.__setattr__(self, name, tuple(int(n) for n in getattr(self, name)))
        named = (*self.in_axes, *self.batch_axes)
        axes = range(len(self.shape))
        if len(set(named)) < len(named) or not set(named) <= set(axes):
            raise ValueError(
                f"in_axes={self.in_axes} and batch_axes={self.batch_axes} must be different axes "
                f"of {list(self.shape)}, from 0 on"
            )
        if not self.in_axes or not self.out_axes:
            missing = "output" if self.in_axes else "input"
            raise ValueError(
                f"a kernel {list(self.shape)} with in_axes={self.in_axes} and "
                f"batch_axes={self.batch_axes} has no {missing} axis"
            )

    @property
    def out_axes(self) -> tuple[int, ...]:
        """The axes that are neither summed over nor batched."""
        named = (*self.in_axes, *self.batch_axes)
        return tuple(axis for axis in range(len(self.shape)) if axis not in named)

    @property
    def lead(self) -> tuple[int, ...]:
        """Sizes of the batch axes."""
        return self.sizes(self.batch_axes)

    @property
    def matrix(self) -> tuple[int, int]:
        """Shape (out, in) of a matrix."""
        return math.prod(self.sizes(self.out_axes)), math.prod(self.sizes(self.in_axes))

    def sizes(self, axes: Iterable[int]) -> tuple[int, ...]:
        """Return the sizes of axes of the kernel."""
        return tuple(self.shape[axis] for axis in axes)

    def to_matrices(self, w: Array) -> Array:
        """Reshape `[*stack, *shape]` to `[*stack, *batch, out, in]`."""
        stack = w.shape[: w.ndim - len(self.shape)]
        if tuple(w.shape[len(stack) :]) != self.shape:
            raise ValueError(f"the weight must be {list(self.shape)}, got {list(w.shape)}")
        order = (*self.batch_axes, *self.out_axes, *self.in_axes)
        axes = (*range(len(stack)), *(len(stack) + axis for axis in order))
        return w.transpose(axes).reshape(*stack, *self.lead, *self.matrix)

    def from_matrices(self, matrices: Array) -> Array:
        """Invert `to_matrices`."""
        stack = matrices.shape[: matrices.ndim - len(self.lead) - 2]
        order = (*self.batch_axes, *self.out_axes, *self.in_axes)
        w = matrices.reshape(*stack, *self.sizes(order))
        back = (len(stack) + order.index(axis) for axis in range(len(order)))
        return w.transpose(*range(len(stack)), *back)


class Fold(KernelAxes):
    """The former name of `KernelAxes`, with its argument and method names."""

    def __init__(self, shape: Any, inputs: Any, batch: Any = ()):
        super().__init__(shape, inputs, batch)

    fold, unfold = KernelAxes.to_matrices, KernelAxes.from_matrices
