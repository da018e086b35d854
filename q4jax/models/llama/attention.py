"""Self-attention of the Llama family: causal, with rotary embeddings and grouped heads."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from q4jax.models.llama.config import LlamaConfig
from q4jax.models.llama.kv_cache import KVCache
from q4jax.models.llama.norm import LlamaRMSNorm
from q4jax.models.llama.rope import rotate
from q4jax.sharding.residual import whole_outputs

Rotation = tuple[jax.Array, jax.Array]  # cosine, sine


class LayerInfo(NamedTuple):
    """Traced properties of one layer of the stack."""

    number: jax.Array  # int32
    windowed: jax.Array  # bool: uses the sliding window


class AttentionMasks(NamedTuple):
    """Masks of T queries over S keys, bool `[B, 1, T, S]`, with and without the sliding window.

    Both are None for plain causal attention. `window` is None if no layer uses the sliding window,
    `full` if all do.
    """

    full: jax.Array | None
    window: jax.Array | None

    @classmethod
    def from_slots(
        cls, config: LlamaConfig, real: jax.Array | None, start: jax.Array | int, tokens: int
    ) -> "AttentionMasks":
        """Build the masks of `tokens` queries in the slots from `start` on.

        `real`, bool `[B, S]`, is True in slots of real tokens; None: the keys are those of the
        queries, without padding.
        """
        windows, reach = config.windowed, config.sliding_window or 0
        if real is None and not any(windows):
            return cls(None, None)
        slots = jnp.arange(tokens if real is None else real.shape[1])
        queries = (start + jnp.arange(tokens))[:, None]
        full = (slots <= queries)[None, None]
        if real is not None:
            full &= real[:, None, None, :]
        if not any(windows):
            return cls(full, None)
        window = full & (slots > queries - reach)
        return cls(None if all(windows) else full, window)

    def for_layer(self, windowed: jax.Array) -> jax.Array | None:
        """Return the mask of one layer, None for plain causal attention."""
        if self.window is None or self.full is None:
            return self.full if self.window is None else self.window
        return jnp.where(windowed, self.window, self.full)


class LlamaAttention(nnx.Module):
    """Causal self-attention with rotary embeddings and grouped query heads."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs, **linear: Any):
        self.head_dim = config.head_dim
        width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        bias = config.attention_bias
        out: dict[str, Any] = {"use_bias": bias, "rngs": rngs, **linear}
        qkv = out | {"use_bias": bias or config.qkv_bias}
        self.q_proj = nnx.Linear(config.hidden_size, width, **qkv)
        self.k_proj = nnx.Linear(config.hidden_size, kv_width, **qkv)
        self.v_proj = nnx.Linear(config.hidden_size, kv_width, **qkv)
        self.o_proj = nnx.Linear(width, config.hidden_size, **out)
        if config.qk_norm:
            self.q_norm = LlamaRMSNorm(config.head_dim, config.rms_norm_eps, rngs)
            self.k_norm = LlamaRMSNorm(config.head_dim, config.rms_norm_eps, rngs)
        self.qk_norm = config.qk_norm

    def __call__(
        self,
        x: jax.Array,
        rope: Rotation,
        masks: AttentionMasks,
        cache: KVCache | None,
        layer: LayerInfo,
    ) -> tuple[jax.Array, KVCache | None]:
        """Apply attention to `x [B, T, hidden_size]`.

        Args:
          x: the normalized residual stream.
          rope: cosine and sine of the tokens' positions.
          masks: masks over the T tokens, or over the slots of the cache.
          cache: cache to attend to, or None.
          layer: number and window of this layer.

        Returns:
          `[B, T, hidden_size]`, and the cache with the keys and values of these tokens.
        """
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k = self.q_proj(x).reshape(heads), self.k_proj(x).reshape(heads)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = rotate(q, *rope), rotate(k, *rope), self.v_proj(x).reshape(heads)
        if cache is not None:
            cache = cache.write(layer.number, k, v)
            # [B, S, kv_heads, head_dim]
            k, v = cache.keys[layer.number], cache.values[layer.number]
        mask = masks.for_layer(layer.windowed)
        # float16 is promoted to float32, since XLA's CPU backend lacks float16 attention.
        q, k, v = (a.astype(jnp.promote_types(a.dtype, jnp.bfloat16)) for a in (q, k, v))
        y = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=mask is None).astype(x.dtype)
        with whole_outputs():
            return self.o_proj(y.reshape(*x.shape[:2], -1)), cache
