"""`LinearGeneral4bit` and `Einsum4bit` for Flax NNX."""

from typing import Any, Self

from flax import nnx
from jax import Array
from jax import numpy as jnp
from jax.typing import DTypeLike

from q4jax.core.argument_names import name_ours
from q4jax.core.codebooks import QuantType
from q4jax.nnx.base import NO_RNGS, other_class
from q4jax.nnx.matrix_layer import MatrixLayer, arithmetic_reason, kernel_axes


class LinearGeneral4bit(MatrixLayer):
    """A linear layer over any axes with a frozen 4-bit kernel, like `nnx.LinearGeneral`.

    Blocks run along the input axes. The weight is that of a `Linear4bit` with the same matrix, one
    for each index of the batch axes. `nnx.MultiHeadAttention` uses such layers.

    Args:
      in_features: sizes of the input axes.
      out_features: sizes of the output axes.
      name: the name of the kernel in errors.
      dtype: dtype of the computation and of the result; None takes the input's.
      quant_type: "nf4" or "fp4".
      blocksize: elements that share a scale; see `Linear4bit`.
      compress_statistics: whether to quantize the scales too.
      implementation: how the layer is computed; see `matmul_4bit`.
      **layer: the other arguments of `nnx.LinearGeneral`, such as axis, use_bias and rngs.

    Raises:
      ValueError: a setting is not allowed; when called, the input does not fit.

    Examples:
      >>> import jax.numpy as jnp, q4jax
      >>> from flax import nnx
      >>> layer = q4jax.LinearGeneral4bit(64, (4, 16), quant_type="nf4", rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 3, 64))).shape, layer.weight.quant_state.spec.tag()
      ((2, 3, 4, 16), 'nf4_b64_n256_float32_64x64')
    """

    __module__ = "q4jax"

    @name_ours
    def __init__(
        self,
        in_features: Any,
        out_features: Any = None,
        *,
        name: str = "kernel",
        dtype: DTypeLike | None = None,
        quant_type: QuantType = "fp4",
        blocksize: int = 64,
        compress_statistics: bool = True,
        implementation: str | None = None,
        **layer: Any,
    ):
        dense = in_features
        if not isinstance(dense, nnx.Module):
            dense = nnx.LinearGeneral(in_features, out_features, **layer)
        self._fill(
            dense,
            linear_general_reason(dense),
            name=name,
            dtype=dtype,
            quant_type=quant_type,
            blocksize=blocksize,
            compress_statistics=compress_statistics,
            implementation=implementation,
        )
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.axis, self.batch_axis = dense.axis, dense.batch_axis

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """Multiply the input axes by the kernel and add the bias, in the compute dtype.

        Args:
          inputs: the input, as for `nnx.LinearGeneral`.
          out_sharding: the sharding of the result on explicit mesh axes.
        """
        return self._compute(inputs, out_sharding)

    @classmethod
    def from_linear_general(cls, layer: nnx.LinearGeneral, **settings: Any) -> Self:
        """Make a 4-bit layer from an `nnx.LinearGeneral`, unchanged; they share the bias.

        Args:
          layer: a layer whose kernel may have leading axes, as `nnx.vmap` makes them.
          **settings: name, dtype (None takes the layer's), quant_type, blocksize,
            compress_statistics and implementation, as for the class.

        Raises:
          TypeError: `layer` is not an `nnx.LinearGeneral`, or its arithmetic was replaced.
          ValueError: a setting is not allowed; the kernel holds NaN or inf.
        """
        return cls(layer, **settings)


class Einsum4bit(MatrixLayer):
    """An einsum layer with a frozen 4-bit kernel, like `nnx.Einsum`.

    Blocks run along the axes that the einsum sums over. Axes that input, kernel and result share,
    such as that of experts, stay apart, with a matrix for each index.

    Args:
      einsum_str: a product of matrices: each letter is in two or in all three of input, kernel and
        result.
      kernel_shape: shape of the kernel.
      name: the name of the kernel in errors.
      dtype: dtype of the computation and of the result; None takes the input's.
      quant_type: "nf4" or "fp4".
      blocksize: elements that share a scale; see `Linear4bit`.
      compress_statistics: whether to quantize the scales too.
      implementation: how the layer is computed; see `matmul_4bit`.
      **layer: the other arguments of `nnx.Einsum`, such as bias_shape and rngs.

    Raises:
      TypeError: the einsum is not a product of matrices.
      ValueError: a setting is not allowed; when called, the input does not fit.

    Examples:
      >>> import jax.numpy as jnp, q4jax
      >>> from flax import nnx
      >>> layer = q4jax.Einsum4bit("ecd,edf->ecf", (4, 64, 128), rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((4, 3, 64))).shape, layer.weight.quant_state.shape
      ((4, 3, 128), (4, 128, 64))
    """

    __module__ = "q4jax"

    @name_ours
    def __init__(
        self,
        einsum_str: Any,
        kernel_shape: Any = None,
        *,
        name: str = "kernel",
        dtype: DTypeLike | None = None,
        quant_type: QuantType = "fp4",
        blocksize: int = 64,
        compress_statistics: bool = True,
        implementation: str | None = None,
        **layer: Any,
    ):
        dense = einsum_str
        if not isinstance(dense, nnx.Module):
            dense = nnx.Einsum(einsum_str, kernel_shape, **layer)
        self._fill(
            dense,
            einsum_reason(dense),
            name=name,
            dtype=dtype,
            quant_type=quant_type,
            blocksize=blocksize,
            compress_statistics=compress_statistics,
            implementation=implementation,
        )
        self.einsum_str = dense.einsum_str

    def __call__(
        self, inputs: Array, einsum_str: str | None = None, out_sharding: Any = None
    ) -> Array:
        """Compute the einsum of the input and the kernel, plus the bias, in the compute dtype.

        Args:
          inputs: the input, as for `nnx.Einsum`.
          einsum_str: an equation in the place of the layer's own, with the same axes of the kernel
            to sum over and to keep apart.
          out_sharding: the sharding of the result on explicit mesh axes.

        Raises:
          ValueError: the input does not fit; `einsum_str` needs the kernel in other blocks.
        """
        return self._compute(inputs, out_sharding, einsum_str)

    @classmethod
    def from_einsum(cls, layer: nnx.Einsum, **settings: Any) -> Self:
        """Make a 4-bit layer from an `nnx.Einsum`, which is not changed; they share the bias.

        Args:
          layer: a layer whose kernel may have leading axes, as `nnx.vmap` makes them.
          **settings: name, dtype (None takes the layer's), quant_type, blocksize,
            compress_statistics and implementation, as for the class.

        Raises:
          TypeError: `layer` is not an `nnx.Einsum` of matrices, or its arithmetic was replaced.
          ValueError: a setting is not allowed; the kernel holds NaN or inf.
        """
        return cls(layer, **settings)


def linear_general_reason(layer: Any) -> str | None:
    """The reason why a module cannot become a `LinearGeneral4bit`, or None."""
    if type(layer) is not nnx.LinearGeneral:
        return other_class(nnx.LinearGeneral, layer)
    if layer.dot_general is not None or layer.dot_general_cls is not None:
        return "its dot_general was replaced"
    return arithmetic_reason(layer)


def einsum_reason(layer: Any) -> str | None:
    """The reason why a module cannot become an `Einsum4bit`, or None."""
    if type(layer) is not nnx.Einsum:
        return other_class(nnx.Einsum, layer)
    if layer.einsum_op is not jnp.einsum:
        return "its einsum_op was replaced"
    try:
        kernel_axes(layer)
    except ValueError as error:
        return str(error)
    return arithmetic_reason(layer)


def to_linear_general(layer: LinearGeneral4bit) -> nnx.LinearGeneral:
    """Make an `nnx.LinearGeneral` with the dequantized kernel; they share the bias."""
    kernel = layer.kernel.dequantize()
    dense = nnx.LinearGeneral(
        layer.in_features,
        layer.out_features,
        axis=layer.axis,
        batch_axis=layer.batch_axis,
        use_bias=False,
        dtype=layer.dtype,
        param_dtype=kernel.dtype,
        precision=layer.precision,
        kernel_init=nnx.initializers.zeros,
        rngs=NO_RNGS,
    )
    dense.kernel = nnx.Param(kernel)  # an initializer is asked for another shape
    dense.use_bias = layer.bias is not None
    dense.bias = layer.bias
    return dense


def to_einsum(layer: Einsum4bit) -> nnx.Einsum:
    """Make an `nnx.Einsum` with the dequantized kernel; they share the bias."""
    kernel = layer.kernel.dequantize()
    dense = nnx.Einsum(
        layer.einsum_str,
        layer.kernel_axes.shape,
        dtype=layer.dtype,
        param_dtype=kernel.dtype,
        precision=layer.precision,
        kernel_init=lambda *_: kernel,
        rngs=NO_RNGS,
    )
    dense.bias_shape = None if layer.bias is None else layer.bias.shape
    dense.bias = layer.bias
    return dense
