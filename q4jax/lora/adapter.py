"""LoRA adapters of linear layers, of embeddings and of single weights."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from q4jax.convert.kernel_axes import KernelAxes
from q4jax.nnx.converters import LayerConverter, converter_for
from q4jax.nnx.quantized_variable import Readable
from q4jax.ops.params import Params4bit

Lead = tuple[int, ...]


class Adapter(nnx.Module):
    """A low-rank update of a weight: `lora_a @ lora_b * scale`, `[*lead, in, out]`.

    `lora_a` and `lora_b` are `nnx.LoRAParam`s: train them with `nnx.DiffState(0, nnx.LoRAParam)`
    and `nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)`.

    Args:
      base: the frozen layer or weight that the adapter updates.
      rank: inner width.
      alpha: numerator of the scale.
      rslora: whether the scale is `alpha / sqrt(rank)` instead of `alpha / rank`.
      dropout: share of the adapter's input that is zeroed until `model.eval()`.
      param_dtype: dtype of `lora_a` and `lora_b`. They compute in the dtype of the base's output.
      rngs: random streams.
    """

    def __init__(
        self,
        base: Any,
        rank: int,
        alpha: float,
        *,
        rslora: bool = False,
        dropout: float = 0.0,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.base = base
        self.rank = rank
        self.alpha = alpha
        self.rslora = rslora
        self.param_dtype = param_dtype
        a, b = self.start(rngs)
        self.dropout = nnx.data(self._dropout(dropout, rngs) if dropout else None)
        self.lora_a = nnx.LoRAParam(a)
        self.lora_b = nnx.LoRAParam(b)

    def sizes(self) -> tuple[Lead, int, int]:
        """Return the leading axes, and the sizes in and out."""
        raise NotImplementedError

    def start(self, rngs: nnx.Rngs) -> tuple[Array, Array]:
        """Return initial values: `lora_a` uniform in ±1/sqrt(in) and `lora_b` zero."""
        lead, inputs, outputs = self.sizes()
        bound = 1.0 / math.sqrt(inputs)
        shape = (*lead, inputs, self.rank)
        a = jax.random.uniform(rngs.params(), shape, self.param_dtype, -bound, bound)
        return a, jnp.zeros((*lead, self.rank, outputs), self.param_dtype)

    @property
    def scale(self) -> float:
        """The factor of the product."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def delta(self) -> Array:
        """Return the update of the weight, float32 `[*lead, in, out]`."""
        low, high = (v[...].astype(jnp.float32) for v in (self.lora_a, self.lora_b))
        return jnp.matmul(low, high, precision=jax.lax.Precision.HIGHEST) * self.scale

    def _dropout(self, rate: float, rngs: nnx.Rngs) -> nnx.Dropout:
        """Return a dropout layer with a random stream for each layer of a stack."""

        def make(rngs: nnx.Rngs) -> nnx.Dropout:
            return nnx.Dropout(rate, rngs=rngs)

        for size in reversed(self._stack()):
            make = nnx.split_rngs(splits=size)(nnx.vmap(make))
        return make(rngs)

    def _stack(self) -> Lead:
        """The leading axes that `vmap` or `scan` remove before a call."""
        return self.sizes()[0]


class LoRALinear4bit(Adapter):
    """A linear layer with an adapter: `base(x) + dropout(x) @ lora_a @ lora_b * scale`.

    The base is a 4-bit linear layer, or the dense layer that one replaces. Where its weight is
    stacked, so is the adapter. It takes the arguments of `Adapter`.
    """

    def __call__(self, x: Array, **kwargs: Any) -> Array:
        """Apply the base layer and add the adapter's output, in the base's compute dtype."""
        y = self.base(x, **kwargs)
        x = x if self.dropout is None else self.dropout(x)
        a, b = (v[...].astype(y.dtype) for v in (self.lora_a, self.lora_b))

        def product(rows: Array) -> Array:
            return (rows @ a) @ b

        update = _converter(self.base).apply(self.base, x.astype(y.dtype), product)
        return y + update * jnp.asarray(self.scale, y.dtype)

    def sizes(self) -> tuple[Lead, int, int]:
        """Return the leading axes, and the sizes in and out."""
        axes = kernel_axes_of(self.base)
        out, inputs = axes.matrix
        return (*self._stack(), *axes.lead), inputs, out

    def _stack(self) -> Lead:
        axes, base = kernel_axes_of(self.base), self.base
        weight = getattr(base, "weight", None)
        if isinstance(weight, Params4bit):
            lead = weight.quant_state.lead
            return lead[: len(lead) - len(axes.lead)]
        shape = tuple(getattr(base, _converter(base).weight).shape)
        return shape[: len(shape) - len(axes.shape)]


def kernel_axes_of(layer: Any) -> KernelAxes:
    """Return the kernel axes of a linear layer, dense or 4-bit."""
    axes = _converter(layer).kernel_axes
    if axes is None:
        raise TypeError(f"a {type(layer).__name__} is not a linear layer")
    return axes(layer)


def _converter(layer: Any) -> LayerConverter:
    converter = converter_for(layer)
    if converter is None:
        raise TypeError(f"q4jax does not know the layer class {type(layer).__name__}")
    return converter


class LoRAEmbedding4bit(Adapter):
    """An embedding with an adapter: `base(ids) + lora_a[ids] @ lora_b * scale`, and in `attend`.

    The base is an `Embedding4bit` or an `nnx.Embed`. It takes the arguments of `Adapter` but
    dropout, since its inputs are integers.
    """

    def __call__(self, ids: Array, **kwargs: Any) -> Array:
        """Look up integers `[...]`: `[..., features]`."""
        y = self.base(ids, **kwargs)
        low = jnp.take(self.lora_a[...], ids, axis=0).astype(y.dtype)
        return y + low @ self.lora_b[...].astype(y.dtype) * jnp.asarray(self.scale, y.dtype)

    def attend(self, query: Array, **kwargs: Any) -> Array:
        """Map `[..., features]` to `[..., num_embeddings]`."""
        y = self.base.attend(query, **kwargs)
        a, b = (v[...].astype(y.dtype) for v in (self.lora_a, self.lora_b))
        return y + (query.astype(y.dtype) @ b.T) @ a.T * jnp.asarray(self.scale, y.dtype)

    def start(self, rngs: nnx.Rngs) -> tuple[Array, Array]:
        """Return initial values: `lora_a` zero and `lora_b` normal, as in PEFT."""
        lead, rows, features = self.sizes()
        b = jax.random.normal(rngs.params(), (*lead, self.rank, features), self.param_dtype)
        return jnp.zeros((*lead, rows, self.rank), self.param_dtype), b

    def sizes(self) -> tuple[Lead, int, int]:
        """Return the leading axes, and the numbers of rows and features."""
        base = self.base
        weight = getattr(base, "weight", None)
        if isinstance(weight, Params4bit):
            lead = weight.quant_state.lead
        else:
            lead = tuple(base.embedding.shape[:-2])
        return lead, base.num_embeddings, base.features


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
