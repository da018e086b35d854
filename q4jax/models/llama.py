"""A decoder-only Llama in Flax NNX, with Hugging Face's names and arithmetic.

Every projection is a module that is called (`self.q_proj(x)`), so `q4jax.quantize_model` and
`q4jax.add_lora` can replace it. The decoder layers are one module whose variables carry a leading
layer axis, run by `nnx.scan`: the program does not grow with depth.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from q4jax.models.cache import KVCache
from q4jax.models.config import LlamaConfig
from q4jax.models.rope import rotate, rotation

Rotation = tuple[jax.Array, jax.Array]  # cosine, sine
Carry = tuple[jax.Array, KVCache | None]  # residual stream, cache


class LlamaRMSNorm(nnx.RMSNorm):
    """RMSNorm with a float32 scale, computed in float32; the result has the dtype of the input."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        super().__init__(
            config.hidden_size,
            epsilon=config.rms_norm_eps,
            dtype=jnp.float32,
            param_dtype=jnp.float32,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """`[..., hidden_size]` to the same shape; `mask` as in `nnx.RMSNorm`."""
        y: jax.Array = super().__call__(x, mask)
        return y.astype(x.dtype)


class LlamaAttention(nnx.Module):
    """Causal self-attention with rotary embeddings; groups of queries share a key/value head."""

    def __init__(self, config: LlamaConfig, **linear: Any):
        self.head_dim = config.head_dim
        width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        linear["use_bias"] = config.attention_bias
        self.q_proj = nnx.Linear(config.hidden_size, width, **linear)
        self.k_proj = nnx.Linear(config.hidden_size, kv_width, **linear)
        self.v_proj = nnx.Linear(config.hidden_size, kv_width, **linear)
        self.o_proj = nnx.Linear(width, config.hidden_size, **linear)

    def __call__(
        self,
        x: jax.Array,
        rope: Rotation,
        mask: jax.Array | None,
        cache: KVCache | None,
        layer: jax.Array,
    ) -> Carry:
        """`x [B, T, hidden_size]` to the same shape.

        `mask` is bool `[B, 1, T, S]`, None for causal attention over the T tokens; with a
        cache, S is its capacity, and the keys and values of `layer` are put into it.
        """
        heads = (*x.shape[:2], -1, self.head_dim)
        q = rotate(self.q_proj(x).reshape(heads), *rope)
        k = rotate(self.k_proj(x).reshape(heads), *rope)
        v = self.v_proj(x).reshape(heads)
        if cache is not None:
            cache = cache.write(layer, k, v)
            k, v = cache.keys[layer], cache.values[layer]  # [B, S, kv_heads, head_dim]
        # In float32 where the compute dtype is float16: XLA's CPU backend lacks the float16 form.
        q, k, v = (a.astype(jnp.promote_types(a.dtype, jnp.bfloat16)) for a in (q, k, v))
        y = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=mask is None).astype(x.dtype)
        return self.o_proj(y.reshape(*x.shape[:2], -1)), cache


class LlamaMLP(nnx.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: LlamaConfig, **linear: Any):
        linear["use_bias"] = config.mlp_bias
        self.gate_proj = nnx.Linear(config.hidden_size, config.intermediate_size, **linear)
        self.up_proj = nnx.Linear(config.hidden_size, config.intermediate_size, **linear)
        self.down_proj = nnx.Linear(config.intermediate_size, config.hidden_size, **linear)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x [..., hidden_size]` to the same shape."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaDecoderLayer(nnx.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs, **linear: Any):
        self.input_layernorm = LlamaRMSNorm(config, rngs)
        self.self_attn = LlamaAttention(config, rngs=rngs, **linear)
        self.post_attention_layernorm = LlamaRMSNorm(config, rngs)
        self.mlp = LlamaMLP(config, rngs=rngs, **linear)

    def __call__(
        self,
        x: jax.Array,
        rope: Rotation,
        mask: jax.Array | None,
        cache: KVCache | None,
        layer: jax.Array,
    ) -> Carry:
        """`x [B, T, hidden_size]` to the same shape; arguments as in `LlamaAttention`."""
        y, cache = self.self_attn(self.input_layernorm(x), rope, mask, cache, layer)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class Llama(nnx.Module):
    """A Llama language model: `model(input_ids [B, T]) -> logits [B, T, vocab_size]`.

    Args:
      config: sizes and constants.
      dtype: compute dtype, of the logits too; None: the dtype of the weights. Norms, rotary
        embeddings and softmax are float32 in any case.
      param_dtype: dtype of the initial weights (norm scales are float32).
      remat: recompute each layer in the backward pass instead of keeping its activations.
      rngs: random streams for the initial weights.

    The variables of `layers` are stacked: `layers.mlp.up_proj.kernel` is `[num_hidden_layers,
    in, out]`.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}

        @nnx.split_rngs(splits=config.num_hidden_layers)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> LlamaDecoderLayer:
            return LlamaDecoderLayer(config, rngs, **dtypes)

        self.config = config
        self.remat = remat
        self.embed_tokens = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs, **dtypes)
        self.layers = stack(rngs)
        self.norm = LlamaRMSNorm(config, rngs)
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Linear(
                config.hidden_size, config.vocab_size, use_bias=False, rngs=rngs, **dtypes
            )

    def __call__(
        self,
        input_ids: jax.Array,
        positions: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
    ) -> jax.Array:
        """Next-token logits of whole sequences.

        Args:
          input_ids: int `[B, T]`.
          positions: int `[B, T]`; None: 0, 1, 2, … over the real tokens of each row.
          attention_mask: bool or int `[B, T]`, 0 where a token is padding (left or right); None:
            none is.

        Returns:
          `[B, T, vocab_size]` in the compute dtype.
        """
        return self.logits(self.hidden_states(input_ids, positions, attention_mask)[0])

    def logits(self, hidden: jax.Array) -> jax.Array:
        """`[..., hidden_size]` of `hidden_states` to `[..., vocab_size]`."""
        if self.config.tie_word_embeddings:
            return self.embed_tokens.attend(hidden)
        return self.lm_head(hidden)

    def hidden_states(
        self,
        input_ids: jax.Array,
        positions: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        cache: KVCache | None = None,
    ) -> Carry:
        """The normalized residual stream `[B, T, hidden_size]`, and the cache with these tokens.

        With a cache, the tokens follow those in it; the caller sees to it that they fit. Arguments
        as in `__call__`.

        Raises:
          ValueError: `input_ids` is not an int array `[B, T]`.
        """
        if input_ids.ndim != 2 or not jnp.issubdtype(input_ids.dtype, jnp.integer):
            raise ValueError(
                f"input_ids must be int [batch, tokens], got {input_ids.dtype}{input_ids.shape}"
            )
        tokens = input_ids.shape[1]
        real = None if attention_mask is None else attention_mask.astype(bool)
        if cache is not None:
            cache = cache.open(jnp.ones(input_ids.shape, bool) if real is None else real)
            mask, default = _mask_and_positions(cache.mask, cache.length, tokens)
        elif real is not None:
            mask, default = _mask_and_positions(real, jnp.zeros((), jnp.int32), tokens)
        else:
            mask, default = None, jnp.broadcast_to(jnp.arange(tokens), input_ids.shape)
        rope = rotation(default if positions is None else positions, self.config)

        def run(block: LlamaDecoderLayer, carry: Carry, layer: jax.Array) -> Carry:
            x, cache = carry
            return block(x, rope, mask, cache, layer)

        if self.remat:
            run = nnx.remat(run, prevent_cse=False, graph_updates=False)
        run = nnx.scan(run, in_axes=(0, nnx.Carry, 0), out_axes=nnx.Carry, graph_updates=False)
        layers = jnp.arange(self.config.num_hidden_layers)
        x, cache = run(self.layers, (self.embed_tokens(input_ids), cache), layers)
        return self.norm(x), cache if cache is None else cache.close(tokens)


def _mask_and_positions(
    real: jax.Array, start: jax.Array, tokens: int
) -> tuple[jax.Array, jax.Array]:
    """What each of `tokens` queries from slot `start` on may attend to, and their positions.

    `real`, bool `[B, S]`, is True for the slots that hold real tokens. Returns bool `[B, 1,
    tokens, S]` and int32 `[B, tokens]`; a position counts the real tokens before it.
    """
    slots = jnp.arange(real.shape[1])
    queries = start + jnp.arange(tokens)
    mask = real[:, None, None, :] & (slots <= queries[:, None])
    count = jnp.maximum(jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1, 0)
    return mask, jax.lax.dynamic_slice_in_dim(count, start, tokens, axis=1)
