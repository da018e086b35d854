"""The 4-bit twins of `nnx.LinearGeneral` and `nnx.Einsum`: a product of folded matrices."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from flax.nnx.nn import dtypes
from jax import Array
from jax import numpy as jnp
from jax.typing import DTypeLike

from q4jax.convert.kernel_axes import Equation, Fold
from q4jax.core.codebooks import QuantType
from q4jax.nnx.linear import _Quantized, other_class
from q4jax.ops.matmul import matmul_4bit
from q4jax.ops.params import Params4bit


def general_equation(layer: Any, ndim: int) -> Equation:
    """What an `nnx.LinearGeneral`, or its 4-bit twin, computes for an input of `ndim` axes."""
    x = [chr(ord("a") + n) for n in range(ndim)]
    outputs = [chr(ord("A") + n) for n in range(len(layer.out_features))]
    batch, inputs = ([x[axis] for axis in axes] for axes in (layer.batch_axis, layer.axis))
    free = [letter for letter in x if letter not in (*batch, *inputs)]
    parts = x, (*batch, *inputs, *outputs), (*batch, *free, *outputs)
    return Equation(*map("".join, parts))


def general_fold(layer: nnx.LinearGeneral) -> Fold:
    """How the kernel of an `nnx.LinearGeneral` becomes matrices."""
    batch = tuple(layer.batch_axis.values())
    shape = (*batch, *layer.in_features, *layer.out_features)
    first = len(batch)
    inputs = range(first, first + len(layer.in_features))
    return Fold(shape, tuple(inputs), tuple(range(first)))


def einsum_fold(layer: nnx.Einsum) -> Fold:
    """How the kernel of an `nnx.Einsum` becomes matrices; ValueError where it cannot."""
    return Equation.parse(layer.einsum_str).fold(layer.kernel_shape)


def why_not_general(layer: Any) -> str | None:
    """Why a module cannot become a `LinearGeneral4bit`, or None where it can."""
    if type(layer) is not nnx.LinearGeneral:
        return other_class(nnx.LinearGeneral, layer)
    if layer.dot_general is not None or layer.dot_general_cls is not None:
        return "its dot_general was replaced"
    return _why_not_arithmetic(layer)


def why_not_einsum(layer: Any) -> str | None:
    """Why a module cannot become an `Einsum4bit`, or None where it can."""
    if type(layer) is not nnx.Einsum:
        return other_class(nnx.Einsum, layer)
    if layer.einsum_op is not jnp.einsum:
        return "its einsum_op was replaced"
    try:
        einsum_fold(layer)
    except ValueError as error:
        return str(error)
    return _why_not_arithmetic(layer)


def _why_not_arithmetic(layer: Any) -> str | None:
    if layer.promote_dtype is not dtypes.promote_dtype:
        return "its promote_dtype was replaced"
    if layer.preferred_element_type is not None:
        return "it has a preferred_element_type"
    return None


class _Folded(_Quantized):
    """A weight of any shape as 4-bit matrices, and the einsum that they compute."""

    def __init__(
        self,
        layer: Any,
        why_not: Callable[[Any], str | None],
        fold_of: Callable[[Any], Fold],
        *,
        name: str = "kernel",
        dtype: DTypeLike | None = None,
        quant_type: QuantType = "nf4",
        blocksize: int = 64,
        compress_statistics: bool = True,
        implementation: str | None = None,
    ):
        reason = why_not(layer)
        if reason:
            raise TypeError(f"{name}: cannot quantize a {type(layer).__name__}: {reason}")
        kernel = layer.kernel[...]
        self.fold = fold_of(layer)
        self.dtype = layer.dtype if dtype is None else dtype
        self.param_dtype = kernel.dtype
        self.precision = layer.precision
        self.quant_type = quant_type
        self.blocksize = blocksize
        self.compress_statistics = compress_statistics
        self.implementation = implementation
        try:
            self._spec(self.fold.matrix)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        self._store(self.fold.fold(kernel), name, {})  # names of folded axes fit no more
        self.bias = layer.bias

    def equation(self, ndim: int) -> Equation:
        """What the layer computes for an input of `ndim` axes."""
        raise NotImplementedError

    def __call__(self, x: Array, *, out_sharding: Any = None) -> Array:
        """The einsum of the input and the weight, plus the bias, in the compute dtype."""
        if out_sharding is not None:
            raise NotImplementedError(
                f"{type(self).__name__} has no out_sharding; constrain its result instead"
            )
        weight = self._load(self.fold.matrix)
        x = x if self.dtype is None else x.astype(self.dtype)
        equation = self.equation(x.ndim)
        product = functools.partial(_product, weight, self.implementation)
        y = equation.apply(x, product, self.fold)
        if self.bias is None:
            return y
        return y + equation.spread(self.bias[...], x.ndim, self.fold).astype(y.dtype)


def _product(weight: Params4bit, implementation: str | None, rows: Array) -> Array:
    def product(rows: Array, weight: Params4bit) -> Array:
        return matmul_4bit(rows, weight, implementation=implementation)

    for _ in weight.quant_state.lead:
        product = jax.vmap(product)
    return product(rows, weight)


class LinearGeneral4bit(_Folded):
    """The 4-bit twin of an `nnx.LinearGeneral`, which is left as it was; the bias is shared.

    Blocks run along the input axes: the weight is that of a `Linear4bit` of the same matrix, one
    for each batch axis. `nnx.MultiHeadAttention` holds such layers.

    Args:
      layer: its kernel may have leading axes, as `nnx.vmap` makes them.
      **settings: name (what errors call the kernel), dtype (None: that of the layer), quant_type,
        blocksize, compress_statistics and implementation, as for `Linear4bit`.

    Raises:
      TypeError: not an `nnx.LinearGeneral`, or one whose arithmetic was replaced.
      ValueError: a setting is not allowed; the kernel holds NaN or inf; when called, an input that
        does not fit.

    Example:
      >>> import jax.numpy as jnp, q4jax
      >>> from flax import nnx
      >>> heads = nnx.LinearGeneral(64, (4, 16), rngs=nnx.Rngs(0))
      >>> layer = q4jax.LinearGeneral4bit(heads)
      >>> layer(jnp.ones((2, 3, 64))).shape, layer.weight.quant_state.spec.tag()
      ((2, 3, 4, 16), 'nf4_b64_n256_float32_64x64')
    """

    def __init__(self, layer: nnx.LinearGeneral, **settings: Any):
        super().__init__(layer, why_not_general, general_fold, **settings)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.axis, self.batch_axis = layer.axis, layer.batch_axis

    def equation(self, ndim: int) -> Equation:
        """What the layer computes for an input of `ndim` axes."""
        return general_equation(self, ndim)

    def dense(self, kernel: Array) -> nnx.LinearGeneral:
        """An `nnx.LinearGeneral` in its place, the bias shared."""
        layer = nnx.LinearGeneral(
            self.in_features,
            self.out_features,
            axis=self.axis,
            batch_axis=self.batch_axis,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=kernel.dtype,
            precision=self.precision,
            kernel_init=nnx.initializers.zeros,
            rngs=nnx.Rngs(0),
        )
        layer.kernel = nnx.Param(kernel)  # its initializers are asked for another shape
        layer.use_bias = self.bias is not None
        layer.bias = self.bias
        return layer


class Einsum4bit(_Folded):
    """The 4-bit twin of an `nnx.Einsum`, which is left as it was; the bias is shared.

    Blocks run along the axes that the einsum sums over. Axes that input, weight and result share,
    such as that of experts, stay apart: one matrix for each.

    Args:
      layer: its equation is a product: each letter is in two places or in all three.
      **settings: as for `LinearGeneral4bit`.

    Raises:
      TypeError: not an `nnx.Einsum`, or one whose arithmetic was replaced.
      ValueError: as for `LinearGeneral4bit`.

    Example:
      >>> import jax.numpy as jnp, q4jax
      >>> from flax import nnx
      >>> experts = nnx.Einsum("ecd,edf->ecf", (4, 64, 128), rngs=nnx.Rngs(0))
      >>> layer = q4jax.Einsum4bit(experts)
      >>> layer(jnp.ones((4, 3, 64))).shape, layer.weight.quant_state.shape
      ((4, 3, 128), (4, 128, 64))
    """

    def __init__(self, layer: nnx.Einsum, **settings: Any):
        super().__init__(layer, why_not_einsum, einsum_fold, **settings)
        self.einsum_str = layer.einsum_str

    def equation(self, ndim: int) -> Equation:
        """What the layer computes, whatever the input."""
        return Equation.parse(self.einsum_str)

    def dense(self, kernel: Array) -> nnx.Einsum:
        """An `nnx.Einsum` in its place, the bias shared."""
        layer = nnx.Einsum(
            self.einsum_str,
            self.fold.shape,
            dtype=self.dtype,
            param_dtype=kernel.dtype,
            precision=self.precision,
            kernel_init=lambda *_: kernel,
            rngs=nnx.Rngs(0),
        )
        layer.bias_shape = None if self.bias is None else self.bias.shape
        layer.bias = self.bias
        return layer
