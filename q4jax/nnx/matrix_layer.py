"""`MatrixLayer`: a layer whose kernel, of any shape, is stored as 4-bit matrices."""

import functools
from typing import Any

import jax
from flax.nnx.nn import dtypes
from jax import Array
from jax.typing import DTypeLike

from q4jax.convert.einsum import BinaryEinsum
from q4jax.convert.kernel_axes import KernelAxes
from q4jax.core.codebooks import QuantType
from q4jax.nnx.base import Quantized, to_sharding
from q4jax.nnx.dense_view import DenseView
from q4jax.ops.matmul import in_compute_dtype, matmul_4bit
from q4jax.ops.params import Params4bit


class MatrixLayer(Quantized):
    """A layer that computes an einsum with 4-bit matrices, made from a dense layer."""

    kernel_axes: KernelAxes

    def _fill(
        self,
        layer: Any,
        unsupported: str | None,
        *,
        name: str,
        dtype: DTypeLike | None,
        quant_type: QuantType,
        blocksize: int,
        compress_statistics: bool,
        implementation: str | None,
    ) -> None:
        """Quantize the kernel of a dense layer, and share its bias."""
        if unsupported:
            raise TypeError(f"{name}: cannot quantize a {type(layer).__name__}: {unsupported}")
        kernel = layer.kernel[...]
        self.kernel_axes = kernel_axes(layer)
        self.dtype = layer.dtype if dtype is None else dtype
        self.param_dtype = kernel.dtype
        self.precision = layer.precision
        self.quant_type = quant_type
        self.blocksize = blocksize
        self.compress_statistics = compress_statistics
        self.implementation = implementation
        try:
            self._spec(self.kernel_axes.matrix)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        # Partition names of the kernel's axes do not fit those of the matrices.
        self._store(self.kernel_axes.to_matrices(kernel), name, {})
        self.bias = layer.bias

    @property
    def kernel(self) -> DenseView:
        """The shape and dtype of the dense kernel; `.dequantize()` makes it."""
        return DenseView(self, "kernel", self.kernel_axes)

    def _compute(self, inputs: Array, out_sharding: Any, einsum_str: str | None = None) -> Array:
        """Compute the einsum of the input and the kernel, plus the bias, in the compute dtype."""
        weight = self._load(self.kernel_axes.matrix)
        x = in_compute_dtype(inputs, self.dtype)
        einsum = einsum_of(self, x.ndim, einsum_str)
        product = functools.partial(_product, weight, self.implementation)
        y = einsum.apply(x, product, self.kernel_axes)
        if self.bias is not None:
            y += einsum.spread(self.bias[...], x.ndim, self.kernel_axes).astype(y.dtype)
        return to_sharding(y, out_sharding)


def _product(weight: Params4bit, implementation: str | None, rows: Array) -> Array:
    def product(rows: Array, weight: Params4bit) -> Array:
        return matmul_4bit(rows, weight, implementation=implementation)

    for _ in weight.quant_state.lead:
        product = jax.vmap(product)
    return product(rows, weight)


def einsum_of(layer: Any, ndim: int, einsum_str: str | None = None) -> BinaryEinsum:
    """Return the einsum that a layer, dense or 4-bit, computes for an input of `ndim` axes.

    Args:
      layer: the layer.
      ndim: axes of the input.
      einsum_str: the equation in the place of an einsum layer's own.

    Raises:
      ValueError: `einsum_str` is no product of matrices, or not with the matrices of the layer.
    """
    if einsum_str is not None:
        einsum, axes = BinaryEinsum.parse(einsum_str), kernel_axes(layer)
        if einsum.kernel_axes(axes.shape) != axes:
            raise ValueError(
                f"einsum_str {einsum_str!r} sums over other axes of the kernel than "
                f"{layer.einsum_str!r}, for which it was quantized"
            )
        return einsum
    if hasattr(layer, "einsum_str"):
        return BinaryEinsum.parse(layer.einsum_str)
    x = [chr(ord("a") + n) for n in range(ndim)]
    outputs = [chr(ord("A") + n) for n in range(len(layer.out_features))]
    batch, inputs = ([x[axis] for axis in axes] for axes in (layer.batch_axis, layer.axis))
    free = [letter for letter in x if letter not in (*batch, *inputs)]
    parts = x, (*batch, *inputs, *outputs), (*batch, *free, *outputs)
    return BinaryEinsum(*map("".join, parts))


def kernel_axes(layer: Any) -> KernelAxes:
    """Return the kernel axes of a layer, dense or 4-bit; ValueError where there are none."""
    if isinstance(layer, MatrixLayer):
        return layer.kernel_axes
    if hasattr(layer, "einsum_str"):
        return BinaryEinsum.parse(layer.einsum_str).kernel_axes(layer.kernel_shape)
    batch = tuple(layer.batch_axis.values())
    first, inputs = len(batch), len(layer.in_features)
    shape = (*batch, *layer.in_features, *layer.out_features)
    return KernelAxes(shape, tuple(range(first, first + inputs)), tuple(range(first)))


def arithmetic_reason(layer: Any) -> str | None:
    """The reason why a layer's arithmetic cannot be kept, or None."""
    if layer.promote_dtype is not dtypes.promote_dtype:
        return "its promote_dtype was replaced"
    if layer.preferred_element_type is not None:
        return "it has a preferred_element_type"
    return None
