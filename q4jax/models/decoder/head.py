"""The head of a language model, as arrays of which some logits at a time can be computed."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from q4jax.core.blockwise import decode_absmax
from q4jax.core.state import QuantState
from q4jax.lora.adapter import Adapter, LoRAEmbedding4bit, LoRALinear4bit
from q4jax.nnx.embedding import Embedding4bit
from q4jax.nnx.linear import Linear4bit
from q4jax.ops.embedding import take_rows
from q4jax.ops.matmul import matmul_4bit
from q4jax.ops.params import Params4bit

# A part of the vocabulary has tokens from this many places of it, so that a device that holds a
# slice of the head has its share of every part.
_PLACES = 16
_NARROWEST = 512  # tokens of a part


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Head:
    """Logits: `cap * tanh(scale * (hidden @ weight.T + inner @ outer + bias) / cap)`.

    Attributes:
      weight: `[vocab, hidden]`, dense or 4-bit; dense `[hidden, vocab]` if `columns`.
      bias: `[vocab]`, or None.
      outer: `[rank, vocab]`, the second factor of an adapter, or None.
      scale: factor of the logits.
      cap: their bound; None: there is none.
      columns: whether a dense weight has the vocabulary in its last axis.
      dtype: compute dtype; None: the dtype that hidden states and weight promote to.
    """

    weight: Array | Params4bit
    bias: Array | None = None
    outer: Array | None = None
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})
    cap: float | None = dataclasses.field(default=None, metadata={"static": True})
    columns: bool = dataclasses.field(default=False, metadata={"static": True})
    dtype: DTypeLike | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def sizes(self) -> tuple[int, int]:
        """The numbers of tokens and of features."""
        state = getattr(self.weight, "quant_state", None)
        shape = self.weight.shape if state is None else state.shape
        return (shape[1], shape[0]) if self.columns else (shape[0], shape[1])

    def compute_dtype(self, hidden: Array) -> np.dtype[Any]:
        """Return the dtype of the products."""
        if self.dtype is not None:
            return jnp.dtype(self.dtype)
        dense = not isinstance(self.weight, Params4bit)
        return jnp.result_type(hidden, *([self.weight] if dense else []))

    def parts(self, most: int) -> int:
        """Return into how many equal parts of at most `most` tokens the vocabulary falls; or 1.

        >>> import jax.numpy as jnp
        >>> [Head(jnp.zeros((vocab, 1))).parts(8192) for vocab in (128256, 32003)]
        [16, 1]
        """
        vocab = self.sizes[0]
        if isinstance(self.weight, Params4bit) and not self.weight.quant_state.spec.in_rows:
            return 1
        whole = (n for n in range(-(-vocab // most), vocab // _NARROWEST + 1) if vocab % n == 0)
        return next(whole, 1)

    def decoded(self) -> "Head":
        """Return the head with plain scales, since nested ones are those of a whole weight."""
        if not isinstance(self.weight, Params4bit):
            return self
        state = self.weight.quant_state
        scales = decode_absmax(state.absmax, state.nested_absmax, state.offset)
        spec = dataclasses.replace(state.spec, nested_blocksize=0)
        plain = Params4bit(self.weight.packed, QuantState(scales, None, None, spec))
        return dataclasses.replace(self, weight=plain)

    def part(self, number: Array, parts: int) -> "Head":
        """Return the head of one part of the vocabulary; 4-bit weights have plain scales."""
        if parts == 1:
            return self

        def rows(array: Array, axis: int = 0) -> Array:
            return take_part(array, number, parts, axis)

        if isinstance(self.weight, Params4bit):
            state = self.weight.quant_state
            spec = dataclasses.replace(
                state.spec, shape=(state.spec.shape[0] // parts, state.spec.shape[1])
            )
            own = QuantState(rows(state.absmax), None, None, spec)
            weight: Array | Params4bit = Params4bit(rows(self.weight.packed), own)
        else:
            weight = rows(self.weight, 1 if self.columns else 0)
        return dataclasses.replace(
            self,
            weight=weight,
            bias=None if self.bias is None else rows(self.bias),
            outer=None if self.outer is None else rows(self.outer, 1),
        )

    def product(self, x: Array) -> tuple[Array, Callable[[Array], Array]]:
        """Return `x @ weight.T` and its transpose, both float32; `x` has the compute dtype."""
        weight = self.weight
        if isinstance(weight, Params4bit):
            y, pull = jax.vjp(lambda x: matmul_4bit(x, weight), x)
            return y.astype(jnp.float32), lambda g: pull(g.astype(y.dtype))[0].astype(jnp.float32)
        weight = weight.astype(x.dtype)
        axes = ("hv", "vh") if self.columns else ("vh", "hv")

        def multiply(equation: str, a: Array) -> Array:
            return jnp.einsum(equation, a, weight, preferred_element_type=jnp.float32)

        y = multiply(f"...h,{axes[0]}->...v", x)
        return y, lambda g: multiply(f"...v,{axes[0]}->...h", g.astype(x.dtype))

    def bounded(self, y: Array) -> tuple[Array, Array]:
        """Return logits of sums of products, and their derivative, float32."""
        y = y * jnp.float32(self.scale)
        if self.cap is None:
            return y, jnp.float32(self.scale)
        ratio = jnp.tanh(y / jnp.float32(self.cap))
        return ratio * jnp.float32(self.cap), (1 - ratio**2) * jnp.float32(self.scale)

    def rows(self, tokens: Array, dtype: Any) -> Array:
        """Return the weight's rows of tokens, float32 `[*tokens.shape, hidden]`."""
        if isinstance(self.weight, Params4bit):
            return take_rows(self.weight, tokens, dtype).astype(jnp.float32)
        # As integers: for a gather of bfloat16, XLA's CPU compiler would widen the whole weight.
        kind = jnp.dtype(f"uint{8 * self.weight.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(self.weight, kind)
        found = jnp.moveaxis(bits[:, tokens], 0, -1) if self.columns else bits[tokens]
        rows = jax.lax.bitcast_convert_type(found, self.weight.dtype)
        return rows.astype(dtype).astype(jnp.float32)


def take_part(array: Array, number: Array, parts: int, axis: int) -> Array:
    """Return one of `parts` equal parts of an axis, of tokens from several places."""
    lead, (size, *tail) = array.shape[:axis], array.shape[axis:]
    places = math.gcd(size // parts, _PLACES)
    split = array.reshape(*lead, places, parts, -1, *tail)
    own = jax.lax.dynamic_index_in_dim(split, number, axis + 1, keepdims=False)
    return own.reshape(*lead, size // parts, *tail)


def join_parts(stacked: Array, axis: int) -> Array:
    """Return an array whose parts are stacked in front: the inverse of `take_part`."""
    parts, shape = stacked.shape[0], stacked.shape[1:]
    places = math.gcd(shape[axis], _PLACES)
    split = stacked.reshape(parts, *shape[:axis], places, -1, *shape[axis + 1 :])
    moved = jnp.moveaxis(split, 0, axis + 1)
    return moved.reshape(*shape[:axis], parts * shape[axis], *shape[axis + 1 :])


def place_of(token: Array, vocab: int, parts: int) -> tuple[Array, Array]:
    """Return the number of the part of each token, and its place in the part."""
    places = math.gcd(vocab // parts, _PLACES)
    width = vocab // parts // places
    place, rest = token // (parts * width), token % (parts * width)
    return rest // width, place * width + rest % width


def head_of(model: Any, hidden: Array) -> tuple[Head, Array | None] | None:
    """Return the head of a `Llama`, and `hidden` times the first factor of the head's adapter.

    None: the head is of a kind that `Head` does not describe, such as one with a DoRA adapter.
    """
    spec = model.config.decoder
    layer = model.embed_tokens if spec.tied else model.lm_head
    fixed: dict[str, Any] = {"scale": spec.logit_scale, "cap": spec.logit_cap}
    inner = None
    if isinstance(layer, Adapter):
        found = _adapter(layer, hidden)
        if found is None:
            return None
        (inner, fixed["outer"]), layer = found, layer.base
    weight: Array | Params4bit
    if isinstance(layer, Linear4bit):
        weight = layer._load((layer.out_features, layer.in_features))
    elif isinstance(layer, Embedding4bit):
        weight = layer._load((layer.num_embeddings, layer.features))
    elif type(layer) is nnx.Linear:
        weight, fixed["columns"] = layer.kernel[...], True
    elif type(layer) is nnx.Embed:
        weight = layer.embedding[...]
    else:
        return None
    bias = model.lm_head_bias if spec.tied and spec.head_bias else getattr(layer, "bias", None)
    fixed["bias"] = None if bias is None else bias[...]
    return Head(weight, dtype=layer.dtype, **fixed), inner


def _adapter(layer: Adapter, hidden: Array) -> tuple[Array, Array] | None:
    if layer.magnitude is not None:
        return None
    dtype = layer.base.dtype or hidden.dtype
    a, b = (v[...].astype(dtype) for v in (layer.lora_a, layer.lora_b))
    if isinstance(layer, LoRAEmbedding4bit):
        a, b = b.T, a.T
    elif not isinstance(layer, LoRALinear4bit):
        return None
    x = hidden if layer.dropout is None else layer.dropout(hidden)
    return (x.astype(dtype) @ a) * jnp.asarray(layer.scale, dtype), b
