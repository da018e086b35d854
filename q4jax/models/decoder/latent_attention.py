"""Multi-head latent attention: keys and values are projected from a narrow vector."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from q4jax.models.decoder.attention import Lent, attend, remember
from q4jax.models.decoder.context import Context
from q4jax.models.decoder.kv_cache import States
from q4jax.models.decoder.mixer_spec import LatentAttention
from q4jax.models.decoder.norm import DecoderNorm
from q4jax.models.decoder.rope import rotate
from q4jax.sharding.residual import whole_outputs


class DecoderLatentAttention(nnx.Module):
    """The attention of DeepSeek V2 and V3; its cache holds keys and values of all heads."""

    def __init__(self, hidden: int, spec: LatentAttention, rngs: nnx.Rngs, **linear: Any):
        self.spec = spec

        def project(inputs: int, outputs: int, bias: bool = False) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, use_bias=bias, rngs=rngs, **linear)

        queries = spec.heads * (spec.plain_dim + spec.rope.dim)
        if spec.q_rank is None:
            self.q_proj = project(hidden, queries)
        else:
            self.q_a_proj = project(hidden, spec.q_rank, spec.bias)
            self.q_a_layernorm = DecoderNorm(spec.q_rank, spec.norm)
            self.q_b_proj = project(spec.q_rank, queries)
        self.kv_a_proj_with_mqa = project(hidden, spec.kv_rank + spec.rope.dim, spec.bias)
        self.kv_a_layernorm = DecoderNorm(spec.kv_rank, spec.norm)
        self.kv_b_proj = project(spec.kv_rank, spec.heads * (spec.plain_dim + spec.value_dim))
        self.o_proj = project(spec.heads * spec.value_dim, hidden, spec.bias)

    def __call__(
        self, x: jax.Array, context: Context, state: States | None, layer: jax.Array, lent: Lent
    ) -> tuple[jax.Array, States | None, Lent]:
        """Apply attention to `x [B, T, hidden]`; arguments as in `DecoderAttention`."""
        spec, (batch, tokens) = self.spec, x.shape[:2]
        turn = context.rotations[spec.rope]

        def heads(y: jax.Array) -> jax.Array:
            return y.reshape(batch, tokens, spec.heads, -1)

        narrow = x if spec.q_rank is None else self.q_a_layernorm(self.q_a_proj(x))
        q = heads(self.q_proj(x) if spec.q_rank is None else self.q_b_proj(narrow))
        turned = rotate(q[..., spec.plain_dim :], turn, spec.rope.interleaved)
        q = jnp.concatenate([q[..., : spec.plain_dim], turned], axis=-1)
        narrow, shared = jnp.split(self.kv_a_proj_with_mqa(x), [spec.kv_rank], axis=-1)
        shared = rotate(shared[:, :, None], turn, spec.rope.interleaved)
        wide = heads(self.kv_b_proj(self.kv_a_layernorm(narrow)))
        k, v = jnp.split(wide, [spec.plain_dim], axis=-1)
        shared = jnp.broadcast_to(shared, (*k.shape[:-1], spec.rope.dim))
        k = jnp.concatenate([k, shared], axis=-1)
        k, v, state = remember(spec, context, state, layer, k, v)
        y = attend(spec, context, q, k, v)
        with whole_outputs():
            return self.o_proj(y.reshape(batch, tokens, -1)), state, lent
