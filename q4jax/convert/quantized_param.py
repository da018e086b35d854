"""`QuantizedParam`: a 4-bit weight that stands in for an array of a model."""

from collections.abc import Iterable
from typing import Any, Self

import jax
from jax import Array
from jax.typing import DTypeLike

from q4jax.convert.kernel_axes import KernelAxes
from q4jax.ops.params import Params4bit, quantize_stacked


class QuantizedParam:
    """A 4-bit weight that stands in for a parameter and is dequantized when its module reads it.

    The module gets an array of the parameter's shape, so its forward code runs unchanged and
    computes what it would with the dequantized weights. Subclasses are pytrees.

    Args:
      weight: `[*stack, *batch, out, in]`.
      kernel_axes: the axes of the parameter.
      dtype: dtype of the array that the module reads.
      variable: what the parameter was: a type of Variable with its metadata, or None.
    """

    def __init__(self, weight: Params4bit, kernel_axes: KernelAxes, dtype: Any, variable: Any):
        self.weight = weight
        self.kernel_axes = kernel_axes
        self.dtype = dtype
        self.variable = variable

    def decode(self) -> Array:
        """Return the parameter's array."""
        return self.kernel_axes.from_matrices(self.weight.dequantize(dtype=self.dtype))

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], Any]:
        """Return the weight with its key, for jax."""
        static = self.kernel_axes, self.dtype, self.variable
        return [(jax.tree_util.GetAttrKey("weight"), self.weight)], static

    @classmethod
    def tree_unflatten(cls, static: Any, leaves: Iterable[Any]) -> Self:
        """Invert `tree_flatten_with_keys`, for jax; leaves may be anything."""
        (weight,) = leaves
        return cls(weight, *static)

    @classmethod
    def quantize(
        cls,
        w: Array,
        axes: KernelAxes,
        name: str,
        *,
        dtype: DTypeLike | None,
        variable: Any,
        **settings: Any,
    ) -> Self:
        """Quantize a parameter's array; ValueError, with its name, as `quantize_4bit`."""
        try:
            weight = quantize_stacked(axes.to_matrices(w), name, **settings)
        except ValueError as error:
            raise ValueError(str(error) if name in str(error) else f"{name}: {error}") from None
        return cls(weight, axes, weight.quant_state.dtype if dtype is None else dtype, variable)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.weight!r}, shape={list(self.kernel_axes.shape)})"
