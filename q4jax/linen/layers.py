"""`Linear4bit`, `Embedding4bit` and their variants for Flax Linen."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from q4jax.core.argument_names import name_ours
from q4jax.core.codebooks import QuantType
from q4jax.core.spec import QuantSpec, float_dtype
from q4jax.linen.adapter import ADAPTERS
from q4jax.linen.variables import COLLECTION, WEIGHT_NAMES, quantize_parameter
from q4jax.ops.embedding import take_rows
from q4jax.ops.matmul import in_compute_dtype, matmul_4bit
from q4jax.ops.params import Params4bit


def _load(
    module: "Linear4bit | Embedding4bit", source: str, init: Any, shape: tuple[int, int], hint: str
) -> Params4bit:
    """Return the stored weight `[out, in]`, checked against the fields of the module."""
    dtype, nested = float_dtype(module.param_dtype, "param_dtype"), module.compress_statistics
    float_dtype(dtype if module.dtype is None else module.dtype)
    tag = QuantSpec.from_shape(shape, dtype, module.quant_type, module.blocksize, nested).tag()

    def create() -> Params4bit:
        dims = shape[::-1] if source == "kernel" else shape
        w = init(module.make_rng("params"), dims, module.param_dtype)
        settings = {"quant_type": module.quant_type, "blocksize": module.blocksize}
        path = (*module.path, source)
        return quantize_parameter(w, path, compress_statistics=nested, **settings)

    # Outside of `init` a missing weight is Flax's own error, whichever collections are mutable.
    name = WEIGHT_NAMES[source]
    weight = module.variable(COLLECTION, name, create if module.is_initializing() else None).value
    found = f"a {type(weight).__name__}"
    if any(leaf is None for leaf in jax.tree.leaves(weight, is_leaf=lambda leaf: leaf is None)):
        found += " without some of its arrays"
    elif isinstance(weight, Params4bit):
        lead = weight.quant_state.lead
        found = weight.quant_state.spec.tag() + (f" with leading axes {list(lead)}" if lead else "")
    if found != tag:
        where = " ".join(filter(None, [type(module).__name__, "/".join(module.path)]))
        raise ValueError(f"{where} is {tag}, its variables hold {found}{hint}")
    return weight


@name_ours
class Linear4bit(nn.Module):
    """A linear layer with a frozen 4-bit weight, called like `nn.Dense`: `x @ W.T + bias`.

    Its variables are `quant/weight`, a `Params4bit` of `[features, in]`, and `params/bias`; where
    `add_lora` made one, `lora/weight` is its adapter. With the same key it has the quantized
    weights of an `nn.Dense` with the same name.

    Attributes:
      features: width of the output.
      use_bias: whether to add a bias.
      dtype: dtype of the computation and of the result; None takes the input's.
      param_dtype: dtype of the weight before quantization, and of a new bias. Variables that were
        quantized from another dtype are refused.
      quant_type: "nf4" or "fp4".
      blocksize: elements that share a scale: 32, 64, 128, 256, 512, 1024, 2048 or 4096.
      compress_statistics: whether to quantize the scales too.
      kernel_init: initializer of the kernel, `[in, features]`. One from `nn.with_partitioning`
        partitions codes and scales.
      bias_init: initializer of the bias, `[features]`.
      implementation: how the layer is computed; see `matmul_4bit`.

    Raises:
      ValueError: a field is not allowed; the input does not fit; stored variables are not those
        that the fields describe (the error names both); in `init`, the kernel holds NaN or inf.
      flax.errors.ScopeVariableNotFoundError: the variables lack the weight.

    Examples:
      >>> import jax, jax.numpy as jnp, q4jax.linen
      >>> layer = q4jax.linen.Linear4bit(128, quant_type="nf4")
      >>> x = jnp.ones((2, 256), jnp.bfloat16)
      >>> variables = layer.init(jax.random.key(0), x)
      >>> variables["quant"]["weight"]
      Params4bit(uint8[128, 128], nf4_b64_n256_float32_128x256)
      >>> layer.apply(variables, x).dtype.name
      'bfloat16'
    """

    features: int
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    quant_type: QuantType = "fp4"
    blocksize: int = 64
    compress_statistics: bool = True
    kernel_init: nn.initializers.Initializer = nn.linear.default_kernel_init
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()
    implementation: str | None = None

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        """Map `[..., in]` to `[..., features]`, in the compute dtype."""
        inputs = in_compute_dtype(inputs, self.dtype)
        if not inputs.ndim:
            raise ValueError("inputs must be [..., in], got a scalar")
        hint = f", for inputs {list(inputs.shape)}"
        shape = (self.features, inputs.shape[-1])
        weight = _load(self, "kernel", self.kernel_init, shape, hint)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        y = matmul_4bit(inputs, weight, bias=bias, implementation=self.implementation)
        name = WEIGHT_NAMES["kernel"]
        if not self.has_variable(ADAPTERS, name):
            return y
        return y + self.get_variable(ADAPTERS, name).apply(inputs.astype(y.dtype))


@name_ours
class LinearNF4(Linear4bit):
    """`Linear4bit` with quant_type "nf4"."""

    quant_type: QuantType = dataclasses.field(default="nf4", init=False)


@name_ours
class LinearFP4(Linear4bit):
    """`Linear4bit` with quant_type "fp4"."""

    quant_type: QuantType = dataclasses.field(default="fp4", init=False)


@name_ours
class Embedding4bit(nn.Module):
    """An embedding with a frozen 4-bit table, called like `nn.Embed`, that decodes rows at lookup.

    Its one variable is `quant/embedding`, a `Params4bit` of `[num_embeddings, features]`.

    Attributes:
      num_embeddings: rows of the table.
      features: width of a row.
      dtype: dtype of the result and compute dtype of `attend`; None takes `param_dtype` and the
        query's dtype.
      param_dtype: dtype of the table before quantization; see `Linear4bit`.
      quant_type: "nf4" or "fp4".
      blocksize: elements that share a scale; see `Linear4bit`.
      compress_statistics: whether to quantize the scales too.
      embedding_init: initializer of the table, `[num_embeddings, features]`.
      implementation: how `attend` is computed; see `matmul_4bit`.

    Raises:
      ValueError: for the reasons of `Linear4bit`; indices are not integers.
      flax.errors.ScopeVariableNotFoundError: the variables lack the table.

    Examples:
      >>> import jax, jax.numpy as jnp, q4jax.linen
      >>> embed = q4jax.linen.EmbeddingNF4(1000, 64)
      >>> ids = jnp.array([[1, 2, 3]])
      >>> variables = embed.init(jax.random.key(0), ids)
      >>> hidden = embed.apply(variables, ids)
      >>> hidden.shape, embed.apply(variables, hidden, method="attend").shape
      ((1, 3, 64), (1, 3, 1000))
    """

    num_embeddings: int
    features: int
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    quant_type: QuantType = "fp4"
    blocksize: int = 64
    compress_statistics: bool = True
    embedding_init: nn.initializers.Initializer = nn.linear.default_embed_init
    implementation: str | None = None

    def setup(self) -> None:
        """Make or read the table."""
        shape = (self.num_embeddings, self.features)
        self._table = _load(self, "embedding", self.embedding_init, shape, "")

    def __call__(self, inputs: Array) -> Array:
        """Look up integers `[...]`: `[..., features]`, NaN where an index is out of range."""
        return take_rows(self._table, jnp.asarray(inputs), self.dtype)

    def attend(self, query: Array) -> Array:
        """Compute `query @ table.T`, `[..., num_embeddings]`, for a tied output."""
        query = in_compute_dtype(query, self.dtype)
        return matmul_4bit(query, self._table, implementation=self.implementation)


@name_ours
class EmbeddingNF4(Embedding4bit):
    """`Embedding4bit` with quant_type "nf4"."""

    quant_type: QuantType = dataclasses.field(default="nf4", init=False)


@name_ours
class EmbeddingFP4(Embedding4bit):
    """`Embedding4bit` with quant_type "fp4"."""

    quant_type: QuantType = dataclasses.field(default="fp4", init=False)
