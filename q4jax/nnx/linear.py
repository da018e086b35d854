"""The 4-bit layers for Flax NNX."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from q4jax.core.codebooks import QuantType
from q4jax.core.spec import QuantSpec, float_dtype
from q4jax.nnx.variables import PLACING, apart, freeze, thaw, transposed
from q4jax.ops.embedding import take_rows
from q4jax.ops.matmul import matmul_4bit
from q4jax.ops.params import Params4bit, as_params4bit, quantize_stacked

_kernel_init = nnx.initializers.lecun_normal()
_embedding_init = nnx.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)


class _Quantized(nnx.Module):
    """A module around one frozen 4-bit weight."""

    weight: Params4bit
    param_dtype: DTypeLike
    quant_type: str
    blocksize: int
    compress_statistics: bool

    def _spec(self, shape: tuple[int, int]) -> QuantSpec:
        """The module's own description of its weight; ValueError for a setting not allowed."""
        dtype = float_dtype(self.param_dtype, "param_dtype")
        return QuantSpec.from_shape(
            shape, dtype, self.quant_type, self.blocksize, self.compress_statistics
        )

    def _store(self, w: Array, name: str, metadata: Mapping[str, Any]) -> None:
        """Quantize `w`, `[*lead, out, in]`, with the module's settings and keep it."""
        weight = quantize_stacked(
            w,
            name,
            quant_type=self.quant_type,
            blocksize=self.blocksize,
            compress_statistics=self.compress_statistics,
        )
        self.weight = freeze(weight, metadata)

    def _load(self, shape: tuple[int, int]) -> Params4bit:
        """The weight with its arrays, as the module's own description has it."""
        weight = thaw(self.weight)
        mine, found = self._spec(shape), weight.quant_state.spec
        if mine != found:
            raise ValueError(f"{type(self).__name__} is {mine.tag()}, its weight is {found.tag()}")
        return weight


class Linear4bit(_Quantized):
    """A linear layer on a frozen 4-bit weight: `x @ W.T + bias`.

    Differentiable in its input and its bias. The weight is a `Params4bit` of `Frozen4bit`
    Variables; only the bias is an `nnx.Param`, so take the whole of `nnx.state(model)` to a
    checkpoint and not `nnx.state(model, nnx.Param)`.

    Args:
      in_features: width of the input.
      out_features: width of the output.
      use_bias: whether to add a bias.
      dtype: compute dtype, and that of the result; None: the input's.
      param_dtype: dtype of the weight before quantization, and of the bias.
      quant_type: "nf4" or "fp4".
      blocksize: elements that share a scale: 32, 64, 128, 256, 512, 1024, 2048 or 4096.
      compress_statistics: double quantization of the scales.
      kernel_init: initializer, called as `nnx.Linear` calls it, for an `[in, out]` kernel.
      bias_init: initializer of the bias, `[out]`.
      kernel_metadata: of the Variables of the weight: `{"out_sharding": (in, out)}` names the mesh
        axes or logical axes of the kernel; codes and scales have them alike. What
        `nnx.with_partitioning` adds to `kernel_init` counts too.
      bias_metadata: of the bias.
      implementation: see `matmul_4bit`.
      rngs: random streams.

    Raises:
      ValueError: quant_type, blocksize or param_dtype is not allowed; when called, an input that
        does not fit, or a weight that is not the one the layer was made for.

    Example:
      >>> import jax.numpy as jnp, q4jax
      >>> from flax import nnx
      >>> layer = q4jax.Linear4bit(256, 128, quant_type="nf4", rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 256), jnp.bfloat16)).dtype.name
      'bfloat16'
      >>> layer.weight.quant_state.spec.tag()
      'nf4_b64_n256_float32_128x256'
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        quant_type: QuantType = "fp4",
        blocksize: int = 64,
        compress_statistics: bool = True,
        kernel_init: nnx.Initializer = _kernel_init,
        bias_init: nnx.Initializer = nnx.initializers.zeros,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        self.in_features = in_features
        self.out_features = out_features
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.quant_type = quant_type
        self.blocksize = blocksize
        self.compress_statistics = compress_statistics
        self.implementation = implementation
        self._spec((out_features, in_features))
        kernel = kernel_init(rngs.params(), (in_features, out_features), param_dtype)
        kernel, metadata = apart(kernel, kernel_metadata)
        if isinstance(kernel, Params4bit):
            self.weight = freeze(kernel)
        else:
            self._store(jnp.swapaxes(kernel, -1, -2), "kernel", transposed(metadata))
        bias = bias_init(rngs.params(), (out_features,), param_dtype) if use_bias else None
        self.bias = nnx.data(None) if bias is None else nnx.Param(bias, **bias_metadata)

    def __call__(self, x: Array) -> Array:
        """`[..., in_features]` to `[..., out_features]` in the compute dtype."""
        weight = self._load((self.out_features, self.in_features))
        x = x if self.dtype is None else x.astype(self.dtype)
        bias = None if self.bias is None else self.bias[...]
        return matmul_4bit(x, weight, bias=bias, implementation=self.implementation)

    @classmethod
    def from_weight(cls, weight: Params4bit, *, dtype: DTypeLike | None = None) -> Self:
        """A layer without bias on a weight that is quantized already.

        Args:
          weight: a matrix `[out, in]`, or a stack of them.
          dtype: compute dtype, and that of the result; None: the input's.

        Raises:
          ValueError: the weight is no matrix, or its arrays do not fit its description.

        Example:
          >>> import jax.numpy as jnp, q4jax
          >>> weight = q4jax.Params4bit.quantize(jnp.ones((32, 64)), quant_type="nf4")
          >>> q4jax.Linear4bit.from_weight(weight)(jnp.ones((1, 64))).shape
          (1, 32)
        """
        spec = as_params4bit(weight).quant_state.spec
        if len(spec.shape) != 2:
            raise ValueError(f"weight must be a matrix or a stack of them, got {weight!r}")
        settings: dict[str, Any] = {"quant_type": spec.quant_type} if cls is Linear4bit else {}
        settings |= {"param_dtype": spec.dtype, "blocksize": spec.blocksize, "use_bias": False}
        settings |= {"compress_statistics": spec.nested, "kernel_init": lambda *_: weight}
        layer = cls(spec.shape[1], spec.shape[0], dtype=dtype, rngs=nnx.Rngs(0), **settings)
        if layer.quant_type != spec.quant_type:
            raise ValueError(f"{cls.__name__} is {layer.quant_type}, the weight is {spec.tag()}")
        return layer

    @classmethod
    def from_linear(cls, linear: nnx.Linear, *, name: str = "kernel", **settings: Any) -> Self:
        """The 4-bit twin of an `nnx.Linear`, which is left as it was; the bias Variable is shared.

        Args:
          linear: its kernel may have leading axes, as `nnx.vmap` makes them.
          name: what errors call the kernel.
          **settings: dtype (None: that of `linear`), quant_type, blocksize, compress_statistics and
            implementation, as for the class.

        Raises:
          TypeError: not an `nnx.Linear`, or one whose arithmetic was replaced.
          ValueError: as for the class; the kernel holds NaN or inf.

        Example:
          >>> import jax.numpy as jnp, q4jax
          >>> from flax import nnx
          >>> linear = nnx.Linear(64, 32, rngs=nnx.Rngs(0))
          >>> q4jax.LinearNF4.from_linear(linear)(jnp.ones((1, 64))).shape
          (1, 32)
        """
        reason = why_not(linear)
        if reason:
            raise TypeError(f"{name}: cannot quantize a {type(linear).__name__}: {reason}")
        kernel = linear.kernel[...]
        metadata = linear.kernel.get_metadata()
        settings["dtype"] = linear.dtype if settings.get("dtype") is None else settings["dtype"]
        fixed: dict[str, Any] = {
            "use_bias": False,
            "param_dtype": kernel.dtype,
            "kernel_init": lambda *_: kernel,
            "kernel_metadata": {name: metadata[name] for name in PLACING if name in metadata},
            "rngs": nnx.Rngs(0),
        }
        try:
            layer = cls(linear.in_features, linear.out_features, **fixed, **settings)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        layer.use_bias = linear.use_bias
        layer.bias = linear.bias
        return layer


def other_class(expected: type, layer: Any) -> str:
    """Why a layer of a class of its own cannot become 4-bit, though `expected` can."""
    kind = type(layer)
    return f"it is not an nnx.{expected.__name__} but {kind.__module__}.{kind.__qualname__}"


def why_not(linear: Any) -> str | None:
    """Why a module cannot become a `Linear4bit`, or None where it can."""
    if isinstance(linear, Linear4bit):
        return "it is quantized already"
    if type(linear) is not nnx.Linear:
        return other_class(nnx.Linear, linear)
    if linear.dot_general is not jax.lax.dot_general:
        return "its dot_general was replaced"
    return None


class LinearNF4(Linear4bit):
    """`Linear4bit` with quant_type "nf4"."""

    def __init__(self, in_features: int, out_features: int, **settings: Any):
        super().__init__(in_features, out_features, quant_type="nf4", **settings)


class LinearFP4(Linear4bit):
    """`Linear4bit` with quant_type "fp4"."""

    def __init__(self, in_features: int, out_features: int, **settings: Any):
        super().__init__(in_features, out_features, quant_type="fp4", **settings)


class Embedding4bit(_Quantized):
    """An embedding on a frozen 4-bit table; only the rows asked for are decoded.

    Args:
      num_embeddings: rows of the table.
      features: width of a row.
      dtype: dtype of the result and compute dtype of `attend`; None: `param_dtype` and the
        query's.
      param_dtype: dtype of the table before quantization.
      quant_type, blocksize, compress_statistics, implementation, rngs: as for `Linear4bit`.
      embedding_init: initializer, called as `nnx.Embed` calls it, for `[num_embeddings, features]`.
      embedding_metadata: as `kernel_metadata` of `Linear4bit`, for the axes of the table.

    Raises:
      ValueError: as `Linear4bit`; when called, indices that are not integers.

    Example:
      >>> import jax.numpy as jnp, q4jax
      >>> from flax import nnx
      >>> embed = q4jax.EmbeddingNF4(1000, 64, rngs=nnx.Rngs(0))
      >>> hidden = embed(jnp.array([[1, 2, 3]]))
      >>> hidden.shape, embed.attend(hidden).shape
      ((1, 3, 64), (1, 3, 1000))
    """

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        quant_type: QuantType = "fp4",
        blocksize: int = 64,
        compress_statistics: bool = True,
        embedding_init: nnx.Initializer = _embedding_init,
        embedding_metadata: Mapping[str, Any] = MappingProxyType({}),
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        self.num_embeddings = num_embeddings
        self.features = features
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.quant_type = quant_type
        self.blocksize = blocksize
        self.compress_statistics = compress_statistics
        self.implementation = implementation
        self._spec((num_embeddings, features))
        table = embedding_init(rngs.params(), (num_embeddings, features), param_dtype)
        table, metadata = apart(table, embedding_metadata)
        self._store(table, "embedding", metadata)

    def __call__(self, inputs: Array) -> Array:
        """Integers `[...]` to `[..., features]`; NaN where an index is out of range."""
        return take_rows(self._load((self.num_embeddings, self.features)), inputs, self.dtype)

    def attend(self, query: Array) -> Array:
        """`query @ table.T`: `[..., features]` to `[..., num_embeddings]`, for a tied output."""
        weight = self._load((self.num_embeddings, self.features))
        query = query if self.dtype is None else query.astype(self.dtype)
        return matmul_4bit(query, weight, implementation=self.implementation)


class EmbeddingNF4(Embedding4bit):
    """`Embedding4bit` with quant_type "nf4"."""

    def __init__(self, num_embeddings: int, features: int, **settings: Any):
        super().__init__(num_embeddings, features, quant_type="nf4", **settings)


class EmbeddingFP4(Embedding4bit):
    """`Embedding4bit` with quant_type "fp4"."""

    def __init__(self, num_embeddings: int, features: int, **settings: Any):
        super().__init__(num_embeddings, features, quant_type="fp4", **settings)
