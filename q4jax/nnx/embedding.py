"""`Embedding4bit` and its variants for Flax NNX."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax import Array
from jax.typing import DTypeLike

from q4jax.convert.kernel_axes import KernelAxes
from q4jax.core.argument_names import name_ours
from q4jax.core.codebooks import QuantType
from q4jax.nnx.base import NO_RNGS, Quantized, other_class, to_sharding
from q4jax.nnx.dense_view import DenseView
from q4jax.nnx.variables import split_metadata
from q4jax.ops.embedding import take_rows
from q4jax.ops.matmul import in_compute_dtype, matmul_4bit

_embedding_init = nnx.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)


class Embedding4bit(Quantized):
    """An embedding with a frozen 4-bit table, of which it decodes only the rows that it looks up.

    Args:
      num_embeddings: rows of the table.
      features: width of a row.
      dtype: dtype of the result and compute dtype of `attend`; None takes `param_dtype` and the
        query's dtype.
      param_dtype: dtype of the table before quantization.
      quant_type: "nf4" or "fp4".
      blocksize: elements that share a scale; see `Linear4bit`.
      compress_statistics: whether to quantize the scales too.
      embedding_init: initializer of the table, `[num_embeddings, features]`.
      embedding_metadata: metadata of the table's Variables; see `kernel_metadata` of `Linear4bit`.
      implementation: how `attend` is computed; see `matmul_4bit`.
      rngs: random streams.

    Raises:
      ValueError: for the reasons of `Linear4bit`; when called, indices that are not integers.

    Examples:
      >>> import jax.numpy as jnp, q4jax
      >>> from flax import nnx
      >>> embed = q4jax.EmbeddingNF4(1000, 64, rngs=nnx.Rngs(0))
      >>> hidden = embed(jnp.array([[1, 2, 3]]))
      >>> hidden.shape, embed.attend(hidden).shape
      ((1, 3, 64), (1, 3, 1000))
    """

    __module__ = "q4jax"

    @name_ours
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
        table, metadata = split_metadata(table, embedding_metadata)
        self._store(table, "embedding", metadata)

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """Look up integers `[...]`: `[..., features]`, NaN where an index is out of range.

        Args:
          inputs: the indices.
          out_sharding: the sharding of the result on explicit mesh axes, as for `nnx.Embed`.
        """
        weight = self._load((self.num_embeddings, self.features))
        return to_sharding(take_rows(weight, inputs, self.dtype), out_sharding)

    def attend(self, query: Array, out_sharding: Any = None) -> Array:
        """Compute `query @ table.T`, `[..., num_embeddings]`, for a tied output.

        Args:
          query: `[..., features]`.
          out_sharding: the sharding of the result on explicit mesh axes, as for `nnx.Embed`.
        """
        weight = self._load((self.num_embeddings, self.features))
        query = in_compute_dtype(query, self.dtype)
        y = matmul_4bit(query, weight, implementation=self.implementation)
        return to_sharding(y, out_sharding)

    @property
    def embedding(self) -> DenseView:
        """The shape `[*lead, num_embeddings, features]` and dtype of the dense table."""
        axes = KernelAxes((self.num_embeddings, self.features), in_axes=(1,))
        return DenseView(self, "embedding", axes)


class EmbeddingNF4(Embedding4bit):
    """`Embedding4bit` with quant_type "nf4"."""

    __module__ = "q4jax"

    @name_ours
    def __init__(self, num_embeddings: int, features: int, **settings: Any):
        super().__init__(num_embeddings, features, quant_type="nf4", **settings)


class EmbeddingFP4(Embedding4bit):
    """`Embedding4bit` with quant_type "fp4"."""

    __module__ = "q4jax"

    @name_ours
    def __init__(self, num_embeddings: int, features: int, **settings: Any):
        super().__init__(num_embeddings, features, quant_type="fp4", **settings)


def unsupported_reason(embed: Any) -> str | None:
    """The reason why a module cannot become an `Embedding4bit`, or None."""
    if type(embed) is not nnx.Embed:
        return other_class(nnx.Embed, embed)
    if embed.promote_dtype is not dtypes.promote_dtype:
        return "its promote_dtype was replaced"
    return None


def from_embed(embed: nnx.Embed, *, name: str, dtype: Any, **settings: Any) -> Embedding4bit:
    """Make an `Embedding4bit` from an `nnx.Embed`; ValueError, with `name`, as the class."""
    table = embed.embedding[...]
    try:
        return Embedding4bit(
            embed.num_embeddings,
            embed.features,
            dtype=embed.dtype if dtype is None else dtype,
            param_dtype=table.dtype,
            embedding_init=lambda *_: table,
            rngs=NO_RNGS,
            **settings,
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def to_embed(layer: Embedding4bit) -> nnx.Embed:
    """Make an `nnx.Embed` with the dequantized table `[*lead, num_embeddings, features]`."""
    table = layer.embedding.dequantize()
    return nnx.Embed(
        layer.num_embeddings,
        layer.features,
        dtype=layer.dtype or table.dtype,
        param_dtype=table.dtype,
        embedding_init=lambda *_: table,
        rngs=NO_RNGS,
    )
