"""LoRA adapters: what they add to a linear layer, to an embedding, to a weight."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from q4jax.convert.kernel_axes import Equation, Fold, Product
from q4jax.nnx.einsum import (
    Einsum4bit,
    LinearGeneral4bit,
    einsum_fold,
    general_equation,
    general_fold,
)
from q4jax.nnx.linear import Embedding4bit, Linear4bit
from q4jax.nnx.readable import Read

Lead = tuple[int, ...]
LINEAR_4BIT = (Linear4bit, LinearGeneral4bit, Einsum4bit)


class Adapter(nnx.Module):
    """A low-rank change of a weight: `lora_a @ lora_b * scale`, `[*lead, in, out]`.

    `lora_a` and `lora_b` are `nnx.LoRAParam`s: train them with `nnx.DiffState(0, nnx.LoRAParam)`
    and `nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)`.

    Args:
      base: what it changes, frozen.
      rank: inner width.
      alpha: numerator of the scale.
      rslora: the scale is `alpha / sqrt(rank)` and not `alpha / rank`.
      dropout: share of the adapter's input that is zeroed; not after `model.eval()`.
      param_dtype: dtype of the adapters. They compute in the dtype of the base's result.
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
        """The leading axes, in and out."""
        raise NotImplementedError

    def start(self, rngs: nnx.Rngs) -> tuple[Array, Array]:
        """New values: `lora_a` uniform in ±1/sqrt(in), `lora_b` zero, so that nothing changes."""
        lead, inputs, outputs = self.sizes()
        bound = 1.0 / math.sqrt(inputs)
        shape = (*lead, inputs, self.rank)
        a = jax.random.uniform(rngs.params(), shape, self.param_dtype, -bound, bound)
        return a, jnp.zeros((*lead, self.rank, outputs), self.param_dtype)

    @property
    def scale(self) -> float:
        """What the product of the two is multiplied with."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def delta(self) -> Array:
        """float32 `[*lead, in, out]`: what is added to the weight."""
        low, high = (v[...].astype(jnp.float32) for v in (self.lora_a, self.lora_b))
        return jnp.matmul(low, high, precision=jax.lax.Precision.HIGHEST) * self.scale

    def _dropout(self, rate: float, rngs: nnx.Rngs) -> nnx.Dropout:
        """A dropout with a random stream for each layer of a stack."""

        def make(rngs: nnx.Rngs) -> nnx.Dropout:
            return nnx.Dropout(rate, rngs=rngs)

        for size in reversed(self._stack()):
            make = nnx.split_rngs(splits=size)(nnx.vmap(make))
        return make(rngs)

    def _stack(self) -> Lead:
        """The leading axes that `vmap` or `scan` take away before a call."""
        return self.sizes()[0]


class LoRALinear4bit(Adapter):
    """A linear layer with an adapter: `base(x) + dropout(x) @ lora_a @ lora_b * scale`.

    The base is a `Linear4bit`, `LinearGeneral4bit` or `Einsum4bit`, or the dense layer of Flax that
    one replaces; where its weight is stacked, so are the adapters. Arguments as for `Adapter`.
    """

    def __call__(self, x: Array, **kwargs: Any) -> Array:
        """What the base takes, to what it gives, in the base's compute dtype."""
        y = self.base(x, **kwargs)
        x = x if self.dropout is None else self.dropout(x)
        a, b = (v[...].astype(y.dtype) for v in (self.lora_a, self.lora_b))

        def product(rows: Array) -> Array:
            return (rows @ a) @ b

        return y + _through(self.base, x.astype(y.dtype), product) * jnp.asarray(
            self.scale, y.dtype
        )

    def sizes(self) -> tuple[Lead, int, int]:
        """The leading axes, in and out."""
        fold = fold_of(self.base)
        out, inputs = fold.matrix
        return (*self._stack(), *fold.lead), inputs, out

    def _stack(self) -> Lead:
        fold, base = fold_of(self.base), self.base
        if isinstance(base, LINEAR_4BIT):
            lead = base.weight.quant_state.lead
            return lead[: len(lead) - len(fold.lead)]
        shape = tuple(base.kernel.shape)
        return shape[: len(shape) - len(fold.shape)]


def fold_of(layer: Any) -> Fold:
    """How the weight of a linear layer of Flax, or of its 4-bit twin, makes matrices."""
    if isinstance(layer, LinearGeneral4bit | Einsum4bit):
        return layer.fold
    if isinstance(layer, nnx.LinearGeneral):
        return general_fold(layer)
    if isinstance(layer, nnx.Einsum):
        return einsum_fold(layer)
    return Fold((layer.in_features, layer.out_features), inputs=(0,))


def _through(layer: Any, x: Array, product: Product) -> Array:
    """A product of matrices in the place of the layer's weight, without its bias."""
    if isinstance(layer, Linear4bit | nnx.Linear):
        return product(x)
    if isinstance(layer, nnx.LinearGeneral):
        equation = general_equation(layer, x.ndim)
    elif isinstance(layer, nnx.Einsum):
        equation = Equation.parse(layer.einsum_str)
    else:
        equation = layer.equation(x.ndim)
    return equation.apply(x, product, fold_of(layer))


class LoRAEmbedding4bit(Adapter):
    """An embedding with an adapter: `base(ids) + lora_a[ids] @ lora_b * scale`, and in `attend`.

    The base is an `Embedding4bit` or an `nnx.Embed`. Arguments as for `Adapter`, but there is no
    dropout: its input are numbers.
    """

    def __call__(self, ids: Array, **kwargs: Any) -> Array:
        """Integers `[...]` to `[..., features]`."""
        y = self.base(ids, **kwargs)
        low = jnp.take(self.lora_a[...], ids, axis=0).astype(y.dtype)
        return y + low @ self.lora_b[...].astype(y.dtype) * jnp.asarray(self.scale, y.dtype)

    def attend(self, query: Array, **kwargs: Any) -> Array:
        """`[..., features]` to `[..., num_embeddings]`."""
        y = self.base.attend(query, **kwargs)
        a, b = (v[...].astype(y.dtype) for v in (self.lora_a, self.lora_b))
        return y + (query.astype(y.dtype) @ b.T) @ a.T * jnp.asarray(self.scale, y.dtype)

    def start(self, rngs: nnx.Rngs) -> tuple[Array, Array]:
        """New values: `lora_a` zero and `lora_b` normal, as PEFT has them for embeddings."""
        lead, rows, features = self.sizes()
        b = jax.random.normal(rngs.params(), (*lead, self.rank, features), self.param_dtype)
        return jnp.zeros((*lead, rows, self.rank), self.param_dtype), b

    def sizes(self) -> tuple[Lead, int, int]:
        """The leading axes, rows and features."""
        base = self.base
        if isinstance(base, Embedding4bit):
            lead = base.weight.quant_state.lead
        else:
            lead = tuple(base.embedding.shape[:-2])
        return lead, base.num_embeddings, base.features


class LoRAWeight(Adapter, Read):
    """A weight with an adapter, in the place of the Variable that a module of any class reads.

    It reads as `base + (lora_a @ lora_b * scale)`, in the shape of the base; so for experts, each
    with an adapter of its own. There is no dropout: the module's input is its own affair.

    Args:
      base: a `ForeignWeight`, or the `nnx.Param` itself.
      fold: how it makes matrices.
      rank: as for `Adapter`, like the other settings.
      alpha: the same.
      **settings: the same.
    """

    def __init__(self, base: Any, fold: Fold, rank: int, alpha: float, **settings: Any):
        self.fold = fold
        super().__init__(base, rank, alpha, **settings)

    def decode(self) -> Array:
        """The owner's array, changed."""
        array = self.base[...]
        return array + self.spread().astype(array.dtype)

    def spread(self) -> Array:
        """float32, in the shape of the base: what is added to it."""
        return self.fold.unfold(jnp.swapaxes(self.delta(), -1, -2))

    def sizes(self) -> tuple[Lead, int, int]:
        """The leading axes, in and out."""
        shape = tuple(self.base.shape)
        stack = shape[: len(shape) - len(self.fold.shape)]
        out, inputs = self.fold.matrix
        return (*stack, *self.fold.lead), inputs, out
