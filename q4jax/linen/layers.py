"""The 4-bit layers for Flax Linen.

Their quantized weights live in a collection of their own, `"quant"`, one `Params4bit` a layer;
the bias is in `"params"`. Differentiate and optimize `"params"` and pass `"quant"` along:
`model.apply({"params": params, "quant": quant}, x)`. `nn.scan` and `nn.vmap` take
`variable_axes={"params": 0, "quant": 0}`.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.typing import DTypeLike

from q4jax.core.codebooks import QuantType
from q4jax.core.spec import QuantSpec, float_dtype
from q4jax.linen.convert import COLLECTION, place_weights, plan_params, quantize_params
from q4jax.ops.embedding import take_rows
from q4jax.ops.matmul import matmul_4bit
from q4jax.ops.params import Params4bit, quantize_stacked

__all__ = [
    "COLLECTION",
    "Embedding4bit",
    "EmbeddingFP4",
    "EmbeddingNF4",
    "Linear4bit",
    "LinearFP4",
    "LinearNF4",
    "place_weights",
    "plan_params",
    "quantize_params",
    "quantize_variables",
]

# The parameter of the dense layer, and the variable that it becomes.
_NAMES = {"kernel": "weight", "embedding": "embedding"}


def _array(leaf: Any) -> Any:
    return leaf.value if isinstance(leaf, nn.Partitioned) else leaf


def _quantize(w: Any, path: tuple[str, ...], **settings: Any) -> Params4bit:
    """Quantize a dense parameter; an `nn.Partitioned` one gives such a box for every leaf."""
    name = "/".join(path)
    float_dtype(_array(w).dtype, name)
    transpose = path[-1] == "kernel"  # [*lead, in, out]
    array = jnp.swapaxes(_array(w), -1, -2) if transpose else _array(w)
    weight = quantize_stacked(array, name, **settings)
    if not isinstance(w, nn.Partitioned):
        return weight
    *lead, rows, columns = w.names
    names = (*lead, columns, rows) if transpose else w.names
    try:
        places = weight.partition_names(names)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return jax.tree.map(lambda leaf, place: w.replace(value=leaf, names=place), weight, places)


def _load(
    module: "Linear4bit | Embedding4bit", source: str, init: Any, shape: tuple[int, int], hint: str
) -> Params4bit:
    """The stored weight of `shape`, `[out, in]`, checked against the fields of the module."""
    dtype, nested = float_dtype(module.param_dtype, "param_dtype"), module.compress_statistics
    float_dtype(dtype if module.dtype is None else module.dtype)
    tag = QuantSpec.from_shape(shape, dtype, module.quant_type, module.blocksize, nested).tag()

    def create() -> Params4bit:
        dims = shape[::-1] if source == "kernel" else shape
        w = init(module.make_rng("params"), dims, module.param_dtype)
        settings = {"quant_type": module.quant_type, "blocksize": module.blocksize}
        path = (*module.path, source)
        return _quantize(w, path, compress_statistics=nested, **settings)

    # Outside of `init` a missing weight is an error, Flax's own, whatever is mutable.
    name = _NAMES[source]
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


class Linear4bit(nn.Module):
    """A linear layer on a frozen 4-bit weight: `x @ W.T + bias`, as `nn.Dense` is called.

    Variables: `quant/weight`, a `Params4bit` of `[features, in]`, and `params/bias`. From one key
    it has the weights that an `nn.Dense` of the same name would have, quantized.

    Attributes:
      features: width of the output.
      use_bias: whether to add a bias.
      dtype: compute dtype, and that of the result; None: the input's.
      param_dtype: dtype of the weight before quantization, and of a new bias. It is part of the
        weight's description: variables that were quantized from another dtype are refused.
      quant_type: "nf4" or "fp4".
      blocksize: elements that share a scale: 32, 64, 128, 256, 512, 1024, 2048 or 4096.
      compress_statistics: double quantization of the scales.
      kernel_init: initializer, called as `nn.Dense` calls it, for an `[in, features]` kernel. One
        from `nn.with_partitioning` partitions codes and scales alike.
      bias_init: initializer of the bias, `[features]`.
      implementation: see `matmul_4bit`.

    Raises:
      ValueError: a field is not allowed; an input that does not fit; stored variables that are
        not what the fields describe (both named); in `init`, a kernel that holds NaN or inf.
      flax.errors.ScopeVariableNotFoundError: the variables lack the weight.

    Example:
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
        """`[..., in]` to `[..., features]` in the compute dtype."""
        inputs = jnp.asarray(inputs, self.dtype)
        if not inputs.ndim:
            raise ValueError("inputs must be [..., in], got a scalar")
        hint = f", for inputs {list(inputs.shape)}"
        shape = (self.features, inputs.shape[-1])
        weight = _load(self, "kernel", self.kernel_init, shape, hint)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        return matmul_4bit(inputs, weight, bias=bias, implementation=self.implementation)


class LinearNF4(Linear4bit):
    """`Linear4bit` with quant_type "nf4"."""

    quant_type: QuantType = dataclasses.field(default="nf4", init=False)


class LinearFP4(Linear4bit):
    """`Linear4bit` with quant_type "fp4"."""

    quant_type: QuantType = dataclasses.field(default="fp4", init=False)


class Embedding4bit(nn.Module):
    """An embedding on a frozen 4-bit table, as `nn.Embed`; only the rows asked for are decoded.

    Its one variable is `quant/embedding`, a `Params4bit` of `[num_embeddings, features]`.

    Attributes:
      num_embeddings: rows of the table.
      features: width of a row.
      dtype: dtype of the result and compute dtype of `attend`; None: `param_dtype` and the
        query's.
      param_dtype, quant_type, blocksize, compress_statistics, implementation: as `Linear4bit`.
      embedding_init: initializer, called as `nn.Embed` calls it, for `[num_embeddings, features]`.

    Raises:
      ValueError: as `Linear4bit`; indices that are not integers.
      flax.errors.ScopeVariableNotFoundError: the variables lack the table.

    Example:
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
        """int `[...]` to `[..., features]`; NaN where an index is out of range."""
        return take_rows(self._table, jnp.asarray(inputs), self.dtype)

    def attend(self, query: Array) -> Array:
        """`query @ table.T`: `[..., features]` to `[..., num_embeddings]`, for a tied output."""
        query = jnp.asarray(query, self.dtype)
        return matmul_4bit(query, self._table, implementation=self.implementation)


class EmbeddingNF4(Embedding4bit):
    """`Embedding4bit` with quant_type "nf4"."""

    quant_type: QuantType = dataclasses.field(default="nf4", init=False)


class EmbeddingFP4(Embedding4bit):
    """`Embedding4bit` with quant_type "fp4"."""

    quant_type: QuantType = dataclasses.field(default="fp4", init=False)


def quantize_variables(
    variables: Mapping[str, Any],
    *,
    skip: Collection[str] = (),
    embeddings: bool = False,
    quant_type: QuantType = "fp4",
    blocksize: int = 64,
    compress_statistics: bool = True,
    check_finite: bool = True,
) -> dict[str, Any]:
    """The variables of a 4-bit model, or of one layer, from those of its dense twin.

    Every `nn.Dense` in "params" is quantized in its place and the rest stays. A layer is known by
    its arrays: `kernel` `[in, out]`, or stacked as `nn.scan` does `[layers, in, out]`, and a `bias`
    that fits. Kernels of `nn.DenseGeneral` and `nn.Conv` can look like stacked ones: skip them.

    Args:
      variables: what `init` of the dense model returned; other collections are kept.
      skip: modules to leave dense, by name ("lm_head") or part of a path ("decoder/lm_head").
      embeddings: quantize every `nn.Embed` also.
      quant_type: as the 4-bit layers have it; their `param_dtype` is the dtype of the kernels.
      blocksize: as the 4-bit layers have it.
      compress_statistics: as the 4-bit layers have it.
      check_finite: raise where a weight holds NaN or inf.

    Raises:
      ValueError: no layer to quantize; a setting is not allowed; a weight, named by its path, is
        not float32, float16 or bfloat16 or holds NaN or inf.

    Example:
      >>> import jax, jax.numpy as jnp, q4jax.linen
      >>> from flax import linen as nn
      >>> x = jnp.ones((2, 64))
      >>> variables = nn.Dense(128).init(jax.random.key(0), x)
      >>> quantized = q4jax.linen.quantize_variables(variables, quant_type="nf4")
      >>> q4jax.linen.LinearNF4(128).apply(quantized, x).shape
      (2, 128)
    """
    if not isinstance(variables.get("params"), Mapping):
        raise ValueError(f"variables must hold a dict 'params', got the keys {list(variables)}")
    if isinstance(skip, str):
        raise ValueError(f"skip must be a list of names, got the string {skip!r}")
    settings: dict[str, Any] = {"quant_type": quant_type, "blocksize": blocksize}
    settings |= {"compress_statistics": compress_statistics, "check_finite": check_finite}
    quant: dict[tuple[str, ...], Any] = {}
    kept: dict[tuple[str, ...], Any] = {}

    def visit(node: Any, path: tuple[str, ...]) -> None:
        where = "/".join(path)
        if not isinstance(node, Mapping) or any(f"/{name}/" in f"/{where}/" for name in skip):
            kept[path] = node
            return
        source = _source(node, embeddings)
        for name, child in node.items():
            if name == source:
                weight = _quantize(child, ("params", *path, name), **settings)
                quant[(*path, _NAMES[name])] = weight
            else:
                visit(child, (*path, name))

    visit(variables["params"], ())
    if not quant:
        left = sorted(map("/".join, kept))
        raise ValueError(f"no layer to quantize with skip={list(skip)}; 'params' holds {left}")
    quant = {**flatten_dict(variables.get(COLLECTION, {})), **quant}
    result = {**variables, "params": unflatten_dict(kept), COLLECTION: unflatten_dict(quant)}
    return {name: tree for name, tree in result.items() if tree}


def _source(node: Mapping[str, Any], embeddings: bool) -> str | None:
    """The weight in the parameters of an `nn.Dense` or `nn.Embed`, or of a stack of them."""
    shapes = {name: tuple(getattr(_array(leaf), "shape", ())) for name, leaf in node.items()}
    kernel, table = shapes.get("kernel", ()), shapes.get("embedding", ())
    if len(kernel) in (2, 3):
        expected = {"kernel": kernel, "bias": kernel[:-2] + kernel[-1:]}
        return "kernel" if shapes.items() <= expected.items() else None
    return "embedding" if embeddings and len(shapes) == 1 and len(table) in (2, 3) else None
