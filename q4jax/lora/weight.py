"""LoRA adapters of single weights, for modules of any class."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from q4jax.convert.kernel_axes import KernelAxes
from q4jax.lora.adapter import Adapter, Lead
from q4jax.nnx.quantized_variable import Readable


class LoRAWeight(Adapter, Readable):
    """A weight with an adapter, which stands in for a Variable of a module of any class.

    It reads as `base + (lora_a @ lora_b * scale)`, in the shape of the base; each expert of a stack
    has an adapter of its own. Dropout is not supported: the adapter does not see the module's
    input.

    Args:
      base: a `QuantizedVariable`, or the `nnx.Param` itself.
      kernel_axes: the axes of the weight.
      rank: inner width.
      alpha: numerator of the scale.
      **settings: the other arguments of `Adapter`.
    """

    def __init__(
        self, base: Any, kernel_axes: KernelAxes, rank: int, alpha: float, **settings: Any
    ):
        self.kernel_axes = kernel_axes
        super().__init__(base, rank, alpha, **settings)

    def decode(self) -> Array:
        """Return the array of the base plus the update."""
        array = self.base[...]
        return array + self.spread().astype(array.dtype)

    def spread(self) -> Array:
        """Return the update in the shape of the base, float32."""
        return self.kernel_axes.from_matrices(jnp.swapaxes(self.delta(), -1, -2))

    def sizes(self) -> tuple[Lead, int, int]:
        """Return the leading axes, and the sizes in and out."""
        shape = tuple(self.base.shape)
        stack = shape[: len(shape) - len(self.kernel_axes.shape)]
        out, inputs = self.kernel_axes.matrix
        return (*stack, *self.kernel_axes.lead), inputs, out
