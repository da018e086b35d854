"""LoRA adapters of linear layers and of embeddings."""

import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from q4jax.convert.kernel_axes import KernelAxes
from q4jax.lora.product import low_rank_product
from q4jax.nnx.base import to_sharding
from q4jax.nnx.converters import LayerConverter, converter_for
from q4jax.nnx.linear import Linear4bit
from q4jax.nnx.variables import from_variables
from q4jax.ops.embedding import take_dense_rows, widen
from q4jax.ops.params import Params4bit

Lead = tuple[int, ...]
Parts = tuple[tuple[int, float], ...]


class LoRAScale(nnx.Variable[Array]):
    """The factors of the adapters of a stack whose layers differ in them; it is not trained."""


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
      dora: whether the merged weight's columns have trained norms (DoRA, arXiv:2402.09353).
      param_dtype: dtype of `lora_a` and `lora_b`. They compute in the dtype of the base's output.
      parts: where the layers of a stack differ, the rank and alpha of each, in the order of the
        leading axes; rank 0 is a layer without an adapter. Ranks below `rank` are padded with
        zeros, which stay zeros in training.
      rngs: random streams.

    Raises:
      NotImplementedError: `dora` for another layer than a linear one.
    """

    def __init__(
        self,
        base: Any,
        rank: int,
        alpha: float,
        *,
        rslora: bool = False,
        dropout: float = 0.0,
        dora: bool = False,
        param_dtype: DTypeLike = jnp.float32,
        parts: Parts | None = None,
        rngs: nnx.Rngs,
    ):
        self.base = base
        self.rank = rank
        self.alpha = alpha
        self.rslora = rslora
        self.param_dtype = param_dtype
        self.parts = nnx.static(parts)
        a, b = self.start(rngs)
        self.dropout = nnx.data(self._dropout(dropout, rngs) if dropout else None)
        self.lora_a = nnx.LoRAParam(a)
        self.lora_b = nnx.LoRAParam(b)
        self.scales: LoRAScale | None = nnx.data(None)
        if parts is not None:
            self.set_parts(parts)
        self.magnitude = nnx.data(None)
        if dora:
            self.magnitude = nnx.data(nnx.LoRAParam(self.norms().astype(param_dtype)))

    def sizes(self) -> tuple[Lead, int, int]:
        """Return the leading axes, and the sizes in and out."""
        raise NotImplementedError

    def start(self, rngs: nnx.Rngs) -> tuple[Array, Array]:
        """Return initial values: `lora_a` uniform in ±1/sqrt(in) and `lora_b` zero."""
        lead, inputs, outputs = self.sizes()
        bound = 1.0 / math.sqrt(inputs)
        shape = (*lead, inputs, self.rank)
        a = jax.random.uniform(rngs.params(), shape, self.param_dtype, -bound, bound)
        if self.parts is not None:
            ranks = np.reshape([rank for rank, _ in self.parts], (*lead, 1, 1))
            a = jnp.where(np.arange(self.rank) < ranks, a, 0)
        return a, jnp.zeros((*lead, self.rank, outputs), self.param_dtype)

    @property
    def scale(self) -> float | Array:
        """The factor of the product; float32 `[*lead]` where the layers of a stack differ."""
        if self.scales is None:
            return scale_of(self.rank, self.alpha, self.rslora)
        return self.scales[...]

    def set_parts(self, parts: Parts) -> None:
        """Give each layer of the stack a rank and an alpha of its own."""
        scales = [scale_of(rank, alpha, self.rslora) if rank else 0.0 for rank, alpha in parts]
        self.parts = nnx.static(parts)
        array = jnp.asarray(scales, jnp.float32).reshape(self.sizes()[0])
        self.scales = nnx.data(LoRAScale(array))

    def product(self) -> Array:
        """Return `lora_a @ lora_b * scale`, float32 `[*lead, in, out]`."""
        low, high = (v[...].astype(jnp.float32) for v in (self.lora_a, self.lora_b))
        product = jnp.matmul(low, high, precision=jax.lax.Precision.HIGHEST)
        return product * jnp.asarray(self.scale, jnp.float32)[..., None, None]

    def delta(self) -> Array:
        """Return the update of the weight, float32 `[*lead, in, out]`."""
        return self.product()

    def norms(self) -> Array:
        """Return the norms of the adapted weight's columns, float32 `[*lead, out]`."""
        kind = type(self.base).__name__
        raise NotImplementedError(f"dora: a {kind} has no DoRA adapter; linear layers have")

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

    def __call__(self, inputs: Array, *args: Any, **kwargs: Any) -> Array:
        """Apply the base layer and add the adapter's output, in the base's compute dtype.

        Args:
          inputs: the base's input.
          *args: the base's other arguments, such as the equation of an einsum.
          **kwargs: the same by name. `out_sharding` is the sharding of the sum.
        """
        if args:
            names = list(inspect.signature(self.base.__call__).parameters)[1:]
            kwargs = dict(zip(names, args, strict=False)) | kwargs
        out_sharding = kwargs.pop("out_sharding", None)
        return to_sharding(self._adapted(inputs, **kwargs), out_sharding)

    @property
    def kernel(self) -> Any:
        """The base's kernel, without the adapter."""
        return self.base.kernel

    def _adapted(self, x: Array, **kwargs: Any) -> Array:
        y = seen = self.base(x, **kwargs)
        if self.dropout is not None:
            dropped = self.dropout(x)
            if self.magnitude is not None and dropped is not x:
                seen = self.base(dropped, **kwargs)
            x = dropped
        a, b = (v[...].astype(y.dtype) for v in (self.lora_a, self.lora_b))

        def product(rows: Array) -> Array:
            return low_rank_product(rows, a, b)

        equation = kwargs.get("einsum_str")
        update = _converter(self.base).apply(self.base, x.astype(y.dtype), product, equation)
        update = update * jnp.asarray(self.scale, y.dtype)
        if self.magnitude is None:
            return y + update
        lead = (1,) * (y.ndim - 1)
        ratio = self._ratio()[..., 0, :].astype(y.dtype).reshape(*lead, -1)
        bias = jnp.zeros_like(ratio) if self.base.bias is None else self.base.bias[...]
        bias = bias.astype(y.dtype).reshape(*lead, -1)
        return y + (ratio - 1) * (seen - bias) + ratio * update

    def norms(self) -> Array:
        """Return the norms of the adapted weight's columns, float32 `[*lead, out]`."""
        if not isinstance(self.base, Linear4bit | nnx.Linear):
            return super().norms()
        return jnp.linalg.norm(self._weight() + self.product(), axis=-2)

    def delta(self) -> Array:
        """Return the update of the weight, float32 `[*lead, in, out]`."""
        if self.magnitude is None:
            return self.product()
        weight = self._weight()
        return (weight + self.product()) * self._ratio() - weight

    def _ratio(self) -> Array:
        """The factors of the weight's columns, float32 `[*lead, 1, out]`."""
        # As in the paper, no gradient flows through the norms.
        norms = jax.lax.stop_gradient(self.norms())
        assert self.magnitude is not None
        ratio = (self.magnitude[...].astype(jnp.float32) / norms)[..., None, :]
        if self.parts is None:
            return ratio
        # The layers of a stack that have no adapter keep their weight.
        return jnp.where(jnp.asarray(self.scale)[..., None, None] == 0, 1.0, ratio)

    def _weight(self) -> Array:
        """The base's weight, float32 `[*lead, in, out]`."""
        if isinstance(self.base, nnx.Linear):
            return self.base.kernel[...].astype(jnp.float32)
        weight = from_variables(self.base.weight).dequantize(dtype=jnp.float32)
        return jnp.swapaxes(weight, -1, -2)

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


def scale_of(rank: int, alpha: float, rslora: bool) -> float:
    """Return the factor of an adapter's product."""
    return alpha / (math.sqrt(rank) if rslora else rank)


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

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """Look up integers `[...]`: `[..., features]`."""
        ids = widen(inputs)
        y = self.base(ids)
        low = take_dense_rows(self.lora_a[...], ids).astype(y.dtype)
        y += low @ self.lora_b[...].astype(y.dtype) * jnp.asarray(self.scale, y.dtype)
        return to_sharding(y, out_sharding)

    def attend(self, query: Array, out_sharding: Any = None) -> Array:
        """Map `[..., features]` to `[..., num_embeddings]`."""
        y = self.base.attend(query)
        a, b = (v[...].astype(y.dtype) for v in (self.lora_a, self.lora_b))
        y += (query.astype(y.dtype) @ b.T) @ a.T * jnp.asarray(self.scale, y.dtype)
        return to_sharding(y, out_sharding)

    @property
    def embedding(self) -> Any:
        """The base's table, without the adapter."""
        return self.base.embedding

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
