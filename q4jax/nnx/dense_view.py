"""`DenseView`: what a 4-bit layer shows in the place of its dense kernel."""

from typing import Any

import numpy as np
from jax import Array

from q4jax.convert.kernel_axes import KernelAxes
from q4jax.nnx.variables import from_variables
from q4jax.ops.not_an_array import NotAnArray
from q4jax.ops.params import Params4bit


class DenseView(NotAnArray):
    """The shape and dtype of a layer's dense kernel or table, whose codes are in `layer.weight`.

    It is made when it is read and is no state of the layer: saving, training and sharding concern
    `layer.weight` alone. To use it as an array is a TypeError that names `dequantize`.

    Attributes:
      shape: shape of the dense array, with leading axes where layers are stacked.
      dtype: dtype of the dense array.
      ndim: its number of axes.
      size: its number of elements.
    """

    def __init__(self, layer: Any, name: str, axes: KernelAxes):
        state = layer.weight.quant_state
        stack = state.lead[: len(state.lead) - len(axes.lead)]
        self._layer, self._name, self._axes = layer, name, axes
        self.shape: tuple[int, ...] = (*stack, *axes.shape)
        self.dtype: np.dtype[Any] = state.dtype
        self.ndim = len(self.shape)
        self.size = int(np.prod(self.shape))

    def dequantize(self, dtype: Any = None) -> Array:
        """Return the dense array, in its own dtype or in `dtype`."""
        weight: Params4bit = from_variables(self._layer.weight)
        return self._axes.from_matrices(weight.dequantize(dtype))

    def __repr__(self) -> str:
        spec = self._layer.weight.quant_state.spec
        return f"DenseView({self.dtype.name}{list(self.shape)}, stored as {spec.tag()})"

    def _advice(self) -> str:
        layer = type(self._layer).__name__
        return (
            f"the {self._name} of a {layer} is stored in 4 bits and is no array: call the layer for"
            f" its product, or layer.{self._name}.dequantize() for the dense array"
        )
