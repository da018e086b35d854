"""Causal self-attention with grouped heads, in the forms that the families have."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from q4jax.models.decoder.attend_in_blocks import Scores, attend_in_blocks
from q4jax.models.decoder.context import Context
from q4jax.models.decoder.kv_cache import States, write, write_ring
from q4jax.models.decoder.mixer_spec import Attention, LatentAttention, Norm
from q4jax.models.decoder.norm import DecoderNorm, normalize
from q4jax.models.decoder.remat import attended, projection
from q4jax.models.decoder.rope import rotate
from q4jax.models.decoder.without_matrices import WithoutMatrices
from q4jax.sharding.residual import whole_outputs

# Keys and values that a layer lends to later ones, by kind of layer.
Lent = dict[str, tuple[jax.Array, jax.Array]]


class DecoderAttention(WithoutMatrices):
    """Attention over earlier tokens; see `Attention` for what it may have."""

    def __init__(self, hidden: int, spec: Attention, rngs: nnx.Rngs, **linear: Any):
        self.spec = spec
        width, kv_width = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim

        def project(name: str, outputs: int) -> None:
            if name:
                layer = nnx.Linear(hidden, outputs, use_bias=spec.bias, rngs=rngs, **linear)
                setattr(self, name, layer)

        if spec.qkv:
            project(spec.qkv, width + 2 * kv_width)
        else:
            project(spec.q, width * (1 + spec.gated))
            project(spec.k, kv_width)
            project(spec.v, kv_width)
        out = nnx.Linear(width, hidden, use_bias=spec.out_bias, rngs=rngs, **linear)
        setattr(self, spec.o, out)
        if spec.norm is not None:
            for name, heads in ((spec.q_norm, spec.heads), (spec.k_norm, spec.kv_heads)):
                if name == spec.k_norm and spec.keys_of == "reads":
                    continue
                shape = {
                    "head": (spec.head_dim,),
                    "all": (heads * spec.head_dim,),
                    "each": (heads, spec.head_dim),
                }[spec.norm_over]
                setattr(self, name, DecoderNorm(shape, spec.norm))
        if spec.sinks:
            self.sinks = nnx.Param(jnp.zeros(spec.heads, jnp.float32))

    def __call__(
        self, x: jax.Array, context: Context, state: States | None, layer: jax.Array, lent: Lent
    ) -> tuple[jax.Array, States | None, Lent]:
        """Apply attention to `x [B, T, hidden]`.

        Args:
          x: the normalized residual stream.
          context: where the tokens stand.
          state: keys and values of the stack's layers, or None.
          layer: int32, the layer's place in the stack.
          lent: keys and values that layers lend.

        Returns:
          `[B, T, hidden]`; the state with these tokens; what is lent from here on.
        """
        spec = self.spec
        q, k, v, gate = self._inputs(x)
        if k is not None and v is None:
            v = k
        if not spec.norm_last:
            q, k = self._norm(q, k)
        if spec.clip is not None:
            q, k, v = (a if a is None else jnp.clip(a, -spec.clip, spec.clip) for a in (q, k, v))
        if spec.rope is not None:
            turn = context.rotations[spec.rope]
            q = rotate(q, turn, spec.rope.interleaved)
            k = k if k is None else rotate(k, turn, spec.rope.interleaved)
        if spec.norm_last:
            q, k = self._norm(q, k)
        if spec.temperature is not None:
            t = spec.temperature
            positions = context.sequences.positions.astype(jnp.float32)
            steps = jnp.floor((positions + t.shift) / t.length)
            q = q * (1 + t.scale * jnp.log1p(steps))[..., None, None].astype(q.dtype)
        if k is None:
            k, v = lent[spec.group]
        else:
            if spec.norm_values:
                wide = v.astype(jnp.float32)
                v = normalize(wide, spec.norm or Norm()).astype(v.dtype)
            k, v, state = remember(spec, context, state, layer, k, v)
            if spec.keys_of == "lends":
                lent = {**lent, spec.group: (k, v)}
        y = attend(spec, context, q, k, v, self.sinks[...] if spec.sinks else None)
        if gate is not None:
            y = y * jax.nn.sigmoid(gate)
        with whole_outputs():
            y = projection(getattr(self, spec.o)(y.reshape(*x.shape[:2], -1)))
        return y, state, lent

    def _inputs(self, x: jax.Array) -> tuple[Any, Any, Any, Any]:
        """Return queries, keys and values `[B, T, heads, head_dim]`, and the gate, or None."""
        spec, (batch, tokens) = self.spec, x.shape[:2]

        def split(y: jax.Array) -> jax.Array:
            return y.reshape(batch, tokens, -1, spec.head_dim)

        if spec.qkv and spec.grouped:
            y = projection(getattr(self, spec.qkv)(x))
            y = y.reshape(batch, tokens, spec.kv_heads, -1, spec.head_dim)
            return split(y[..., :-2, :]), y[..., -2, :], y[..., -1, :], None
        if spec.qkv:
            ends = [spec.heads * spec.head_dim, (spec.heads + spec.kv_heads) * spec.head_dim]
            q, k, v = jnp.split(projection(getattr(self, spec.qkv)(x)), ends, axis=-1)
            return split(q), split(k), split(v), None
        q, gate = projection(getattr(self, spec.q)(x)), None
        if spec.gated:
            q, gate = jnp.split(q.reshape(batch, tokens, spec.heads, -1), 2, axis=-1)
        names = (spec.k, spec.v)
        kv = [split(projection(getattr(self, name)(x))) if name else None for name in names]
        return split(q), kv[0], kv[1], gate

    def _norm(self, q: jax.Array, k: Any) -> tuple[jax.Array, Any]:
        spec = self.spec
        if spec.norm is None:
            return q, k

        def apply(name: str, a: Any) -> Any:
            if a is None:
                return None
            if spec.norm_over != "all":
                return getattr(self, name)(a)
            return getattr(self, name)(a.reshape(*a.shape[:2], -1)).reshape(a.shape)

        return apply(spec.q_norm, q), apply(spec.k_norm, k)


def remember(
    spec: Attention | LatentAttention,
    context: Context,
    state: States | None,
    layer: jax.Array,
    k: jax.Array,
    v: jax.Array,
) -> tuple[jax.Array, jax.Array, States | None]:
    """Write keys and values `[B, T, ...]` to the state; return those to attend to, and it."""
    if state is None:
        return k, v, None
    ring = context.ring(spec)
    if ring is None:
        state = write(state, layer, context.start, keys=k, values=v)
        return state["keys"][layer], state["values"][layer], state
    before = (state["keys"][layer], state["values"][layer])
    state = write_ring(state, layer, context.slots[ring], keys=k, values=v)
    k, v = (jnp.concatenate(pair, axis=1) for pair in zip(before, (k, v), strict=True))
    return k, v, state


def attend(
    spec: Any, context: Context, q: jax.Array, k: jax.Array, v: jax.Array, sinks: Any = None
) -> jax.Array:
    """Return `[B, T, heads, value_dim]` of queries `[B, T, heads, dim]` over S keys and values."""
    reach, dtype = context.reach(spec), q.dtype
    cap, alibi = getattr(spec, "cap", None), getattr(spec, "alibi", None)
    # float16 is promoted to float32, since XLA's CPU backend lacks float16 attention.
    wide = jnp.float32 if dtype == jnp.float16 else dtype
    q, k, v = (a.astype(wide) for a in (q, k, v))
    if reach.blocks is not None:
        how = Scores(reach.view, spec.scale, cap, alibi)
        return attend_in_blocks(how, q, k, v, sinks, reach.blocks).astype(dtype)
    if cap is None and alibi is None and sinks is None and k.shape == v.shape:
        with jax.numpy_dtype_promotion("standard"):  # JAX's function relies on it for bfloat16
            y = jax.nn.dot_product_attention(
                q, k, v, mask=reach.mask, scale=spec.scale, is_causal=reach.mask is None
            )
        return attended(y.astype(dtype))
    batch, tokens, kv_heads = q.shape[0], q.shape[1], k.shape[2]
    q = q.reshape(batch, tokens, kv_heads, -1, q.shape[-1])
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=jnp.float32)
    scores = scores * jnp.float32(spec.scale)
    if cap is not None:
        scores = jnp.tanh(scores / jnp.float32(cap)) * jnp.float32(cap)
    if alibi is not None:
        keys, queries = reach.ranks
        distance = (keys[:, None, :] - queries[:, :, None]).astype(jnp.float32)
        slopes = jnp.asarray(alibi, jnp.float32).reshape(1, kv_heads, -1, 1, 1)
        scores = scores + slopes * distance[:, None, None]
    mask = reach.mask
    if mask is None:
        mask = jnp.tril(jnp.ones((tokens, k.shape[1]), bool))[None, None]
    scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    if sinks is not None:
        extra = sinks.astype(jnp.float32).reshape(1, kv_heads, -1, 1, 1)
        extra = jnp.broadcast_to(extra, (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, extra], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : k.shape[1]]
    y = jnp.einsum("bkgts,bskd->btkgd", weights.astype(wide), v)
    y = y.reshape(batch, tokens, -1, v.shape[-1]).astype(dtype)
    return attended(y)
